r"""Reading comprehension with four choices: RACE (middle, high) and QuAIL.

The prompt is a passage followed by LLM-Adapters' multiple-choice text of the commonsense tasks, so a prompt that
exceeds `data.max_length` loses the beginning of its passage and never the question::

    Passage: Tom put the cake on the bench. ...

    Please choose the correct answer to the question: Where is the cake?

    Answer1: on the bench Answer2: in the hall Answer3: at home Answer4: not enough information

    Answer format: answer1/answer2/answer3/answer4

The target is "the correct answer is answer1"; as in the commonsense tasks, an answer must equal the gold answer
exactly. This rendering is ours; none has been published for these tasks in this form.

| task | train rows | test rows (split) | licence |
|---|---|---|---|
| race_middle | 25,421 | 1,436 (test) | research use only, no redistribution |
| race_high | 62,445 | 3,498 (test) | research use only, no redistribution |
| quail | 10,246 | 2,164 (development) | CC BY-NC-SA 4.0 |

RACE: Lai et al. 2017, arXiv:1704.04683; rows on the hub are {example_id, article, answer: "A", question, options}. The
original files contain one article each: {id, article, questions, options, answers}. Files such as
`race_high/train.jsonl` can have either format, with one article or one question per line.
QuAIL 1.3: Rogers et al. 2020, https://github.com/text-machine-lab/quail, XML. Its test answers are not public; papers
report results on its development rows.

Validation rows are whole passages (`passages.carve_passages`): at least `data.validation_size` rows, exceeded by less
than one passage.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from ...storage.reading import naming
from ..example import Example, Row, column, exact_match, list_in, text_in, texts_in
from ..family import Family, Task
from ..files import Rows, label_of, read_file, text_lines
from ..rows import HubRows, LocalRows, by_name
from .commonsense import example_of, extract, with_choices
from .passages import carve_passages, prompt_about

REQUEST = "choose the correct answer to the question: "


def multiple_choice(task: str, passage: str, question: str, choices: Sequence[str], gold: int) -> Example:
    """Return the example of a question about a passage; `gold` is the index of the right choice."""
    if not 0 <= gold < len(choices):
        raise ValueError(f"the answer must be one of the {len(choices)} choices; got number {gold + 1}")
    asked = prompt_about(passage, REQUEST, question)
    return example_of(task, *with_choices(asked, "answer", [choice.strip() for choice in choices], gold))


def race(task: str, row: Row) -> Example:
    """Return the example of {article, question, options, answer: "A" to "D"}."""
    options, letter = texts_in(row, "options"), str(column(row, "answer")).strip()
    letters = list("ABCDEFGH"[: len(options)])
    if letter not in letters:
        raise ValueError(f"the answer must be one of {', '.join(letters)}; got {letter!r}")
    article, question = text_in(row, "article"), text_in(row, "question")
    return multiple_choice(task, article, question, options, letters.index(letter))


def read_articles(path: Path) -> Rows:
    """Yield one row per question, from rows with one question or, as in RACE's own files, an article with several."""
    for row, where in read_file(path):
        if "questions" not in row:
            yield row, where
            continue
        with naming(where):
            article = column(row, "article")
            parts = [list_in(row, name) for name in ("questions", "options", "answers")]
            if len({len(part) for part in parts}) != 1:
                counts = ", ".join(str(len(part)) for part in parts)
                raise ValueError(f"questions, options and answers must be of equal length; got {counts}")
        for i, (question, options, answer) in enumerate(zip(*parts, strict=True)):
            found = {"article": article, "question": question, "options": options, "answer": answer}
            yield found, f"{where}, question {i}"


def quail(row: Row) -> Example:
    """Return the example of {context, question, answers, correct_answer_id}."""
    passage, question = text_in(row, "context"), text_in(row, "question")
    number = column(row, "correct_answer_id")
    try:
        gold = int(number)
    except (TypeError, ValueError) as error:
        raise ValueError(f"correct_answer_id must be the number of an answer; got {number!r}") from error
    return multiple_choice("quail", passage, question, texts_in(row, "answers"), gold)


def read_quail(path: Path) -> Rows:
    """Yield one row per question of QuAIL's XML, with those columns of the hub that are used."""
    text = "".join(text_lines(path))
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: not XML ({error})") from error
    for text in root.iter("text"):
        place = f"{label_of(path)}, text {text.get('id')}"
        context = text.findtext("text_body", default="").strip()
        for q in text.iter("q"):
            where = f"{place}, question {q.get('id')}"
            answers = q.findall("a")
            right = [i for i, answer in enumerate(answers) if answer.get("correct") == "True"]
            if len(right) != 1:
                raise ValueError(f"{where}: exactly one answer must be marked correct; got {len(right)}")
            row = {
                "context": context,
                "question": (q.text or "").strip(),
                "answers": [(answer.text or "").strip() for answer in answers],
                "correct_answer_id": right[0],
            }
            yield row, where


def _race(size: str) -> Task:
    name = f"race_{size}"
    return Task(
        name,
        partial(race, name),
        hub=HubRows.splits("ehovy/race", size),
        local={
            split: (LocalRows((f"{name}/{split}.jsonl",), read=read_articles),) for split in ("train", "test")
        },
    )


TASKS = by_name(
    _race("middle"),
    _race("high"),
    Task(
        "quail",
        quail,
        hub=HubRows.splits("textmachinelab/quail", "quail", test="validation"),
        local={
            split: (
                LocalRows((f"quail/quail_1.3_{part}_randomized.xml",), read=read_quail),
                LocalRows((f"quail/{split}.jsonl",)),
            )
            for split, part in (("train", "train"), ("test", "dev"))
        },
    ),
)

FAMILY = Family(
    name="reading",
    version=1,
    tasks=TASKS,
    score=exact_match(extract),
    max_new_tokens=32,  # as for the commonsense tasks, which have the same targets
    carve=carve_passages,
)
