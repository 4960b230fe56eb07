r"""Questions about pictures: custom rows and hub rows that name a picture or contain it.

    reft-train model=smolvlm_256m data=vqa data.path=FOLDER
    reft-train model=smolvlm_256m data=llava data.path=llava_instruct.json data.image_folder=FOLDER

There are two kinds of rows:

    {"image": "cats/1.jpg", "question": "How many?", "answers": ["2", "two", "2"]}
    {"image": "cats/1.jpg", "conversations": [{"from": "human", "value": "<image>\nHow many?"},
                                              {"from": "gpt", "value": "Two."}]}

| setting | meaning |
|---|---|
| `path`, `validation_path`, `test_path`, `source` | as for `data=custom`: files and folders in any of its formats, or a hub dataset |
| `image` | the picture column: a file name, a list of file names, or bytes as in the hub's tables; empty for a row without a picture |
| `image_folder` | the folder that file names are relative to; defaults to the folder of the rows |
| `prompt`, `target` | the question and answer columns; an answer can be a list of several people's answers (texts, or VQA's objects with `answer`), of which the most common is learnt |
| `messages` | instead of both, a column of conversations in LLaVA's or OpenAI's format; the last answer is learnt |

`<image>` marks the place of a picture in a text; without marks, pictures come first. The template is `chat`, from the
model's processor; a processor without a chat template (PaliGemma's) needs `data.template=plain`.

A question is scored by VQA accuracy (`vqa_accuracy.py`; a row with one answer counts as if ten people had given it) and
by exact match with the learnt answer. A conversation is scored by exact match, and its checkpoints are selected by the
loss.

Changes: version 4 tokenises answers after their prompts, which avoids a second blank from Llama's tokenizer; version 3
reads 16-bit grey pictures over their whole range, answers given as a JSON list in a CSV file, and ".5" as a different
number from "5"; version 2 rotates photographs by their EXIF orientation; version 1, first version.
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
TEMPLATE = "chat"  # the default of data.template
PEOPLE = 10  # answers per question in VQA; a single answer counts as this many


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
    """Return the family of rows with pictures, with the single task `vision`; see the table above for the arguments.

    Raises:
        ValueError: for missing or conflicting settings, or a column that none of the first rows has.
        FileNotFoundError: if the file or folder does not exist, or the folder has no train file.
    """
    tables = tables_of(path, source, validation_path, test_path)
    if not image:
        raise ValueError("rows with pictures need data.image, the picture column")
    if bool(messages) == bool(prompt or target) or bool(prompt) != bool(target):
        raise ValueError(
            "rows with pictures need either data.prompt and data.target, the question and answer columns, or "
            f"data.messages, a column of conversations; got prompt={prompt!r}, target={target!r}, messages={messages!r}"
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
    """Turn rows with pictures into examples."""

    image: str
    folder: Path
    prompt: str | None
    target: str | None
    messages: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """Return the required columns; conversations need no picture column, as LLaVA has rows without it."""
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
            raise ValueError(f"the answer contains the mark {MARK}; pictures can only be in the question")
        turns, prompt = marked(turns, prompt, pictures)
        answer = answer.strip()
        recorded = {"picture": ", ".join(picture.name for picture in pictures)} if pictures else {}
        return Example(
            TASK, prompt, answer, answer, turns=turns, pictures=pictures,
            references=people if len(people) > 1 else (), recorded=recorded,
        )  # fmt: skip


def _people(value: Any, name: str) -> tuple[str, ...]:
    """Return each person's answer."""
    if isinstance(value, str) and (listed := json_list(value)) is not None:
        value = listed
    parts = value if isinstance(value, list | tuple) else [value]
    answers = (part.get("answer") if isinstance(part, Mapping) else part for part in parts)
    return tuple(text.strip() for answer in answers if (text := text_of(answer, name)).strip())


exact = exact_match(lambda text: text.strip() or None, measure="exact_match")


def judge(texts: Sequence[str], example: Example) -> Judgement:
    """Return VQA accuracy and exact match, averaged over the texts of a question."""
    people = example.references or (example.answer,) * PEOPLE
    accuracy = sum(vqa_accuracy(text, people) for text in texts) / len(texts)
    answer, scores = exact(texts, example)
    return Judgement(answer, {"vqa_accuracy": accuracy, **scores})
