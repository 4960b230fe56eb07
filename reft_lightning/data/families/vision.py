r"""Questions about pictures: rows of one's own, and of the hub, that name a picture or hold it.

    reft-train model=smolvlm_256m data=vqa data.path=FOLDER
    reft-train model=smolvlm_256m data=llava data.path=llava_instruct.json data.image_folder=FOLDER

Two kinds of rows:

    {"image": "cats/1.jpg", "question": "How many?", "answers": ["2", "two", "2"]}
    {"image": "cats/1.jpg", "conversations": [{"from": "human", "value": "<image>\nHow many?"},
                                              {"from": "gpt", "value": "Two."}]}

| setting | meaning |
|---|---|
| `path`, `validation_path`, `test_path`, `source` | as for `data=custom`: files and folders in any of its formats, or a data set of the hub |
| `image` | the column of the picture: the name of a file, a list of names, or bytes as the hub's tables have them; empty for a row without one |
| `image_folder` | what names of files are relative to; the folder of the rows unless given |
| `prompt`, `target` | the columns of the question and of its answer; an answer may be a list of what several people said (texts, or VQA's objects with `answer`), of which the commonest is learnt |
| `messages` | instead of both, a column of conversations, in LLaVA's form or OpenAI's: the last answer is learnt |

`<image>` marks where a picture stands in a text; without a mark pictures come first. The template is `chat`, that of the
model's processor; a processor without one (PaliGemma's) needs `data.template=plain`.

A question is scored by VQA accuracy (`vqa_accuracy.py`; a row with one answer counts as if ten people had given it) and
by exact match with what is learnt; a conversation by exact match, and its checkpoints are chosen by the loss.

Changes: version 4 tokenizes answers after their prompts, which leaves out a second blank of Llama's tokenizer; version 3
reads grey pictures of 16 bits over their whole range, answers that a CSV file holds as a JSON list, and ".5" as another
number than "5"; version 2 turns photographs as their cameras were held (EXIF); version 1, first version.
"""  # noqa: E501

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..columns import exchange_of, json_list, text_of
from ..example import Example, Judgement, Row, column, exact_match
from ..family import Family, Task
from ..pictures import MARK, marked, pictures_in
from .custom import beginnings, carve, check_columns, tables_of
from .vqa_accuracy import vqa_accuracy

TASK = "vision"
MAX_NEW_TOKENS = 64
TEMPLATE = "chat"  # where data.template names no other
PEOPLE = 10  # of VQA; a single answer counts as theirs


def vision_family(
    *,
    path: str | None,
    source: str = "local",
    image: str | None = "image",
    image_folder: str | None = None,
    prompt: str | None = None,
    target: str | None = None,
    messages: str | None = None,
    validation_path: str | None = None,
    test_path: str | None = None,
    template: str | None = None,
) -> Family:
    """Return the family of rows with pictures; its one task is `vision`. The arguments are those of the table above.

    Raises:
        ValueError: for settings that are missing or exclude each other, or a column that all of the first rows lack.
        FileNotFoundError: if there is no such file or folder, or no train file in it.
    """
    tables = tables_of(path, source, validation_path, test_path)
    if not image:
        raise ValueError("rows with pictures need data.image, the column that names them")
    if bool(messages) == bool(prompt or target) or bool(prompt) != bool(target):
        raise ValueError(
            "rows with pictures need data.prompt and data.target, the columns of a question and its answer, or "
            f"data.messages, one of conversations; got prompt={prompt!r}, target={target!r}, messages={messages!r}"
        )
    place = Path(image_folder or str(path)).expanduser().absolute()
    folder = place if image_folder or place.is_dir() else place.parent
    make = SeenRows(image, folder, prompt, target, messages)
    check_columns(make.names, beginnings(tables))
    places: dict[str, Any] = {source: tables}
    return Family(
        name="vision",
        kind="vision",
        version=4,
        tasks={TASK: Task(TASK, make, **places)},
        max_new_tokens=MAX_NEW_TOKENS,
        score=exact if messages else judge,
        measures=("exact_match",) if messages else ("vqa_accuracy", "exact_match"),
        main="loss" if messages else None,
        literal=False,
        template=template or TEMPLATE,
        carve=carve,
    )


@dataclass(frozen=True)
class SeenRows:
    """Make examples of rows with pictures."""

    image: str
    folder: Path
    prompt: str | None
    target: str | None
    messages: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """Return the columns that every row has; of conversations some may lack pictures, as in LLaVA's rows."""
        return (self.messages,) if self.messages else (str(self.prompt), str(self.target), self.image)

    def __call__(self, row: Row) -> Example:
        """Return the example of a row."""
        pictures = pictures_in(row.get(self.image), self.image, self.folder)
        if self.messages:
            turns, prompt, answer = exchange_of(column(row, self.messages))
            people: tuple[str, ...] = ()
        else:
            turns, prompt = (), text_of(column(row, str(self.prompt)), str(self.prompt))
            people = _people(column(row, str(self.target)), str(self.target))
            answer = Counter(people).most_common(1)[0][0] if people else ""
        for text, what in ((prompt.replace(MARK, ""), "question"), (answer, "answer")):
            if not text.strip():
                raise ValueError(f"the row has no {what}")
        if MARK in answer:
            raise ValueError(f"the answer holds the mark {MARK}; a picture can only be seen, not learnt")
        turns, prompt = marked(turns, prompt, pictures)
        answer = answer.strip()
        recorded = {"picture": ", ".join(picture.name for picture in pictures)} if pictures else {}
        return Example(
            TASK, prompt, answer, answer, turns=turns, pictures=pictures,
            references=people if len(people) > 1 else (), recorded=recorded,
        )  # fmt: skip


def _people(value: Any, name: str) -> tuple[str, ...]:
    """Return what each person answered."""
    if isinstance(value, str) and (listed := json_list(value)) is not None:
        value = listed
    parts = value if isinstance(value, list | tuple) else [value]
    answers = (part.get("answer") if isinstance(part, Mapping) else part for part in parts)
    return tuple(text.strip() for answer in answers if (text := text_of(answer, name)).strip())


exact = exact_match(lambda text: text.strip() or None, measure="exact_match")


def judge(texts: Sequence[str], example: Example) -> Judgement:
    """Return VQA accuracy and exact match of the texts of a question, as means over them."""
    people = example.references or (example.answer,) * PEOPLE
    accuracy = sum(vqa_accuracy(text, people) for text in texts) / len(texts)
    answer, scores = exact(texts, example)
    return Judgement(answer, {"vqa_accuracy": accuracy, **scores})
