"""How validation rows are held out from the train rows, and what identifies a set of rows."""

from __future__ import annotations

import hashlib
import logging
import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from .example import Example, question_of

log = logging.getLogger(__name__)


Stratum = Callable[[Example], Hashable]
Carved = tuple[list[Example], list[Example]]  # train rows, validation rows


def by_task(example: Example) -> str:
    """Return the task of a row as its stratum."""
    return example.task


def distinct(examples: Iterable[Example]) -> list[Example]:
    """Return the first row for each question."""
    first: dict[Hashable, Example] = {}
    for example in examples:
        first.setdefault(question_of(example), example)
    return list(first.values())


def carve_validation(examples: Sequence[Example], size: int, seed: int, stratum: Stratum = by_task) -> Carved:
    """Hold out `size` validation rows from the train rows, and remove repetitions of their prompts from training.

    Each stratum contributes its share of the rows (largest remainders), so small tasks are not forgotten. The chosen
    rows have distinct prompts. The choice depends only on `seed` and the rows: subsets of the train rows are taken
    afterwards (`subset`), so a smaller run is validated on the same rows as a full one.

    Args:
        examples: all train rows.
        size: number of validation rows; 0 for none.
        seed: the seed of the split, not of the run.
        stratum: the groups to balance over; the task by default.

    Returns:
        (train, validation), both in the order of `examples`.

    Raises:
        ValueError: if `size` is negative, or leaves no train rows.
    """
    if size < 0:
        raise ValueError(f"data.validation_size must be at least 0; got {size}")
    if size == 0:
        return list(examples), []
    first = distinct(examples)
    if size >= len(first):
        raise ValueError(
            f"data.validation_size must be smaller than the {len(first)} distinct train prompts; got {size}"
        )
    validation = drawn(first, size, seed, stratum)
    held_out = {question_of(example) for example in validation}
    train = [example for example in examples if question_of(example) not in held_out]
    repeated = len(examples) - len(train) - len(validation)
    if repeated:
        log.info("%d train rows repeat a validation prompt and were removed from training", repeated)
    return train, validation


def drawn(examples: Sequence[Example], size: int, seed: int, stratum: Stratum) -> list[Example]:
    """Return `size` of the rows, in their order; each stratum contributes its share (largest remainders)."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i, example in enumerate(examples):
        groups[stratum(example)].append(i)
    exact = {key: size * len(rows) / len(examples) for key, rows in groups.items()}
    quota = {key: int(share) for key, share in exact.items()}
    by_remainder = sorted(groups, key=lambda key: quota[key] - exact[key])  # ties in order of appearance
    for key in by_remainder[: size - sum(quota.values())]:
        quota[key] += 1
    rng = random.Random(seed)
    chosen = sorted(i for key, rows in groups.items() for i in rng.sample(rows, quota[key]))
    return [examples[i] for i in chosen]


def subset(examples: Sequence[Any], limit: int | None, seed: int) -> list[Any]:
    """Return `limit` rows drawn without replacement, in their order; all of them if `limit` is None.

    With the same seed, a larger subset contains the smaller ones.
    """
    if limit is None:
        return list(examples)
    if limit < 1:
        raise ValueError(f"a limit must be at least 1, or None for all rows; got {limit}")
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    return [examples[i] for i in sorted(order[:limit])]


def fingerprint(examples: Iterable[Any]) -> str:
    """Return a short hash of the content of examples, in order; equal hashes mean equal data."""
    digest = hashlib.sha256()
    for example in examples:
        for text in example.content:
            digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()[:16]
