r"""Reading comprehension with answers in the passage's own words: SQuAD 1.1 and the English part of XQuAD.

The passage comes first, so a long prompt loses the beginning of its passage and never the question::

    Passage: Tom put the cake on the bench. ...

    Please answer the question with words of the passage: Where is the cake?

The target is "the correct answer is on the bench"; the answer in a text is the rest of the line after this phrase. This
rendering is ours. The measures are SQuAD's: `exact_match` and `f1` over words, each the best over the gold answers,
compared in lower case without punctuation, articles and superfluous white space (Rajpurkar et al. 2016,
arXiv:1606.05250, section 6.1).

| task | train rows | test rows (split) | licence |
|---|---|---|---|
| squad | 87,599 | 10,570 (development; the test rows are not public) | CC BY-SA 4.0 |
| xquad_en | none: set `train_tasks` | 1,190 questions of SQuAD's development rows | CC BY-SA 4.0 |

Rows on the hub: {id, title, context, question, answers: {text: [...], answer_start: [...]}}; SQuAD's own JSON nests
them: {data: [{title, paragraphs: [{context, qas: [{id, question, answers: [{text, answer_start}]}]}]}]}.
XQuAD: Artetxe et al. 2020, arXiv:1910.11856, https://github.com/google-deepmind/xquad.

Validation rows are whole passages (`passages.carve_passages`): at least `data.validation_size` rows, exceeded by less
than one passage.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ...storage.reading import naming
from ..example import Example, Judgement, Row, column, list_in, text_in, texts_in
from ..family import Family, Task
from ..files import Rows, label_of, parse_json, text_lines
from ..rows import HubRows, LocalRows, by_name
from .commonsense import TRIGGER
from .passages import carve_passages, prompt_about

REQUEST = "answer the question with words of the passage: "
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def extract(text: str) -> str | None:
    r"""Return the rest of the line after the first trigger phrase, stripped; None without the phrase.

    >>> extract("the correct answer is on the bench \nPassage: ...")
    'on the bench'
    """
    _, found, after = text.partition(TRIGGER)
    return after.strip().partition("\n")[0].strip() if found else None


def words(answer: str) -> list[str]:
    """Return the words of an answer, normalised as in SQuAD.

    >>> words("The  Pro-Bowl, a game!")
    ['probowl', 'game']
    """
    return _ARTICLES.sub(" ", answer.lower().translate(_NO_PUNCTUATION)).split()


def f1(found: Sequence[str], gold: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall over words, counting repetitions.

    If either answer has no words, the score is 1 if both have none, otherwise 0.

    >>> f1(["pro", "bowl"], ["bowl"])
    0.6666666666666666
    """
    if not found or not gold:
        return float(not found and not gold)
    shared = (Counter(found) & Counter(gold)).total()
    return 2 * shared / (len(found) + len(gold))


def score(texts: Sequence[str], example: Example) -> Judgement:
    """Score the answers of all texts against the gold answers and return the mean over the texts."""
    golds = [words(gold) for gold in json.loads(example.answer)]
    answers = [extract(text) for text in texts]
    found = [words(answer) for answer in answers if answer is not None]  # the others score 0
    scores = {
        "exact_match": sum(float(answer in golds) for answer in found) / len(texts),
        "f1": sum(max(f1(answer, gold) for gold in golds) for answer in found) / len(texts),
    }
    return Judgement(answers[0], scores)


def span(task: str, row: Row) -> Example:
    """Return the example of {context, question, answers}, whose answer is a JSON list of the gold texts."""
    texts = [" ".join(text.split()) for text in texts_in(column(row, "answers"), "text")]
    golds = list(dict.fromkeys(text for text in texts if text))
    if not golds:
        raise ValueError("the row has no answer; questions without answers (SQuAD 2.0) are not supported")
    passage, question = (text_in(row, part) for part in ("context", "question"))
    prompt = prompt_about(passage, REQUEST, question) + "\n"
    return Example(task, prompt, TRIGGER + golds[0], json.dumps(golds, ensure_ascii=False))


def read_squad(path: Path) -> Rows:
    """Yield one row per question of SQuAD's nested JSON, with the hub's columns."""
    label = label_of(path)
    try:
        whole = parse_json("".join(text_lines(path)), str(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    if not isinstance(whole, dict):
        raise ValueError(
            f"{path}: SQuAD's JSON must be an object with a list 'data'; got {type(whole).__name__}"
        )
    with naming(label):
        articles = list_in(whole, "data")
    for i, article in enumerate(articles):
        with naming(f"{label}, article {i}"):
            paragraphs = list_in(article, "paragraphs")
        for j, paragraph in enumerate(paragraphs):
            place = f"{label}, article {i}, paragraph {j}"
            with naming(place):
                context, asked = column(paragraph, "context"), list_in(paragraph, "qas")
            for k, qa in enumerate(asked):
                where = f"{place}, question {k}"
                with naming(where):
                    answers = {"text": [column(answer, "text") for answer in list_in(qa, "answers")]}
                    row = {"context": context, "question": column(qa, "question"), "answers": answers}
                yield row, where


TASKS = by_name(
    Task(
        "squad",
        partial(span, "squad"),
        hub=HubRows.splits("rajpurkar/squad", test="validation"),
        local={
            split: (
                LocalRows((f"squad/{part}-v1.1.json",), read=read_squad),
                LocalRows((f"squad/{split}.jsonl",)),
            )
            for split, part in (("train", "train"), ("test", "dev"))
        },
    ),
    Task(
        "xquad_en",
        partial(span, "xquad_en"),
        hub={"test": (HubRows("google/xquad", "xquad.en", "validation"),)},
        local={"test": (LocalRows(("xquad_en/xquad.en.json",), read=read_squad),)},
    ),
)

FAMILY = Family(
    name="spans",
    version=1,
    tasks=TASKS,
    score=score,
    measures=("exact_match", "f1"),
    max_new_tokens=64,
    carve=carve_passages,
)
