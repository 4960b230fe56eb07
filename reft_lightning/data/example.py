"""A row in the form that the rest of the package uses, and how its generated texts are scored."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from ..suggest import did_you_mean
from .pictures import Picture

Row = Mapping[str, Any]
T = TypeVar("T")
Made = TypeVar("Made")
_WORD_OR_SYMBOL = re.compile(r"""\w+|[^\w\s.,;:!?'"()‘’“”…]""")


@dataclass(frozen=True)
class Example:
    """One question: what the model reads, what it learns to generate, and what counts as correct.

    Args:
        task: name of the benchmark, such as `"boolq"`.
        prompt: the question or instruction, which a template (`prompts.py`) turns into the text that the model reads.
            Empty if the target is a text without a prompt.
        target: the text to learn, without the end-of-sequence token.
        answer: the gold answer, as `Family.score` finds it in the target.
        options: candidate target texts, ranked by likelihood in the evaluation; empty for open questions.
        source: where the row comes from (`"boolq/train.json, row 17"`), for error messages; set when the row is read.
        context: what the instruction refers to, Alpaca's "### Input:".
        turns: earlier turns of a conversation, as (role, text) with the roles system, user and assistant.
        source_prompt: another prompt, whose hidden states interchange interventions insert into this one.
        pictures: one for each mark in the texts, in the same order.
        marked: (start, end) of each span of edited words in the prompt, after its marks are removed (`marks.py`).
        references: answers of several people, of which the gold answer is the most common.
        recorded: column -> value, written with the prediction of this row. Ignored in comparisons.
    """

    task: str
    prompt: str
    target: str
    answer: str
    options: tuple[str, ...] = ()
    source: str = ""
    context: str = ""
    turns: tuple[tuple[str, str], ...] = ()
    source_prompt: str = ""
    pictures: tuple[Picture, ...] = ()
    references: tuple[str, ...] = ()
    marked: tuple[tuple[int, int], ...] = ()
    recorded: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def content(self) -> tuple[str, ...]:
        """Return everything that identifies this row: its texts, options, pictures and gold answers."""
        turns = tuple(text for turn in self.turns for text in turn)
        several = (self.options, turns, self.seen, self.references)
        one = (self.task, self.prompt, self.target, self.answer, self.context, self.source_prompt)
        return (*one, *(text for texts in several for text in (str(len(texts)), *texts)))

    @property
    def seen(self) -> tuple[str, ...]:
        """Return the digests of the pictures."""
        return tuple(picture.digest for picture in self.pictures)


class Judgement(NamedTuple):
    """The result of scoring the generated texts of one row.

    Args:
        answer: the answer found in the (first) text; None if none was found, which counts as missing.
        scores: measure -> score, 0..1.
    """

    answer: str | None
    scores: dict[str, float]


Score = Callable[[Sequence[str], Example], Judgement]


def exact_match(
    extract: Callable[[str], str | None],
    equal: Callable[[str | None, str], bool] = operator.eq,
    measure: str = "accuracy",
) -> Score:
    """Return a scorer that compares an extracted answer with the gold answer.

    Args:
        extract: generated text -> answer, or None if there is none.
        equal: (answer, gold answer) -> whether it is correct.
        measure: name of the share of correct answers.

    >>> score = exact_match(lambda text: text.strip() or None)
    >>> score([" yes"], Example("t", "p", "yes", "yes"))
    Judgement(answer='yes', scores={'accuracy': 1.0})
    """

    def score(texts: Sequence[str], example: Example) -> Judgement:
        answers = [extract(text) for text in texts]
        share = sum(equal(answer, example.answer) for answer in answers) / len(answers)
        return Judgement(answers[0], {measure: share})

    return score


def normalized(question: str) -> str:
    """Return the words and symbols of a question in lower case, separated by spaces, for comparing questions.

    Sentence punctuation is ignored unless there is nothing else; operators and emoji count.

    >>> normalized("What is  (2+3)?")
    'what is 2 + 3'
    """
    return " ".join(_WORD_OR_SYMBOL.findall(question.lower())) or " ".join(question.split())


def placed(make: Callable[[Row], Made], row: Row, where: str) -> Made:
    """Return the example made from a row, with the row's source, which is also named in errors."""
    try:  # `naming` would take a tenth longer for many rows
        example = make(row)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    # safe because nothing else refers to it yet; `replace` takes as long as `make`
    object.__setattr__(example, "source", where)
    return example


def column(row: Row, name: str) -> Any:
    """Return one column of a row.

    Raises:
        ValueError: if the column is missing (lists the columns there are), or the row is not an object.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"must be an object with the column {name!r}; got {row!r:.80}")
    if name not in row:
        raise ValueError(
            f"no column {name!r}{did_you_mean(name, row)}; the columns are {', '.join(map(str, row))}"
        )
    return row[name]


def text_in(row: Row, name: str) -> str:
    """Return one column of a row, which must hold text; bytes, as in some Parquet files, are decoded as UTF-8."""
    return as_text(column(row, name), name)


def texts_in(row: Row, name: str) -> list[str]:
    """Return one column of a row, which must hold a list of texts."""
    return [as_text(part, name) for part in list_in(row, name)]


def list_in(row: Row, name: str) -> Sequence[Any]:
    """Return one column of a row, which must hold a list."""
    value = column(row, name)
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} must be a list; got {value!r:.80}")
    return value


def as_text(value: Any, name: str) -> str:
    """Return a value, which must be text, see `text_in`."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} holds bytes that are not UTF-8 text: {value!r:.80}") from error
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text; got {value!r:.80}")
    return value


def question_of(example: Example) -> Hashable:
    """Return a key that is equal for two rows with the same question or, without prompts, the same text."""
    return example.prompt or example.target, example.context, example.turns, example.seen


def named_task(family: str, tasks: Mapping[str, T], name: str) -> T:
    """Return a family's task by name; the error for an unknown name suggests the closest one."""
    if name not in tasks:
        raise ValueError(
            f"{family} has no task {name!r}{did_you_mean(name, tasks)}; its tasks are {', '.join(tasks)}"
        )
    return tasks[name]
