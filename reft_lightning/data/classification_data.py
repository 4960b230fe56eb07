"""The data module of classifiers: one task per run, with its published validation set divided in two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import random_split

from .benchmark_data import BenchmarkData
from .example import normalized
from .labelled import ClassificationFamily, LabelledText
from .rows import DataSource
from .splits import fingerprint, subset
from .texts import EncodedTexts, TextCollator

LARGE, FROM_LARGE = 5000, 1000  # of a validation set with more than 5,000 rows, 1,000 are for selection


def divide(examples: Sequence[LabelledText], seed: int) -> tuple[list[LabelledText], list[LabelledText]]:
    """Divide a published validation set into rows for selection and rows for the test.

    If there are more than 5,000 rows, 1,000 are for selection, otherwise half of them (rounded down).

    Both the rule and the rows are those of the ReFT paper (appendix C.3; pyreft, examples/loreft/train.py): the
    authors call torch's `random_split`, test rows first, with the global generator, right after `set_seed(seed)` and
    reading the data, which draws nothing. A separate generator with the same seed draws the same permutation,
    whatever else the run has drawn. If `seed` is the run's seed, the rows are those of the authors' current code
    (their first version used numpy), so each seed is tested on different rows; with a fixed seed all runs share them.

    Returns:
        (selection, test), both in the published order.
    """
    selection = FROM_LARGE if len(examples) > LARGE else len(examples) // 2
    generator = torch.Generator().manual_seed(seed)
    rows: Any = range(len(examples))
    test, selected = random_split(rows, [len(examples) - selection, selection], generator)
    return [examples[i] for i in sorted(selected.indices)], [examples[i] for i in sorted(test.indices)]


class ClassificationData(BenchmarkData):
    """Loaders for a family of kind `classification`; takes the arguments of `BenchmarkData`, with a single task.

    Limits apply after the division. With `split_seed=None` the division uses the run's seed, as in the authors' code.
    """

    def __init__(
        self,
        family: ClassificationFamily,
        tokenizer: Any,
        source: DataSource | str,
        *,
        tasks: Sequence[str],
        **settings: Any,
    ) -> None:
        super().__init__(family, tokenizer, source, tasks=tasks, **settings)
        self.task = family.only_task(tasks)

    @property
    def test_tasks(self) -> tuple[str, ...]:
        """Return the task, whose test rows are part of its validation set, and its further test sets."""
        return (self.task.name, *(f"{self.task.name}_{split}" for split in self.task.further_tests))

    def _read_train(self) -> list[LabelledText]:
        return self._read(self.task, "train")

    def _divide(self, train: list[LabelledText]) -> tuple[list[LabelledText], list[LabelledText]]:
        selection, _ = divide(self._read(self.task, "validation"), self.split_seed)
        return train, subset(selection, self.limit_validation, self.split_seed)

    def _read_test(self) -> dict[str, list[LabelledText]]:
        _, rest = divide(self._read(self.task, "validation"), self.split_seed)
        self.data_versions["test"][self.task.name] = {"source": self.source.kind, "rows": len(rest)}
        sets = {self.task.name: rest}
        for split in self.task.further_tests:
            name = f"{self.task.name}_{split}"
            sets[name] = self._read(self.task, split, "test", name)
        return sets

    def _build_test(self) -> None:
        if not self.sealed:
            self.setup("fit")  # the train rows, against which the overlap is measured
        super()._build_test()
        for name, rows in self._test.items():
            used = {"test_rows": len(rows), "test_fingerprint": fingerprint(rows.examples)}
            self.data_versions["test"][name] |= used

    def _question(self, example: LabelledText) -> tuple[str, ...]:
        return tuple(normalized(text) for text in example.texts)

    def _encode(self, examples: list[LabelledText], what: str, training: bool = False) -> EncodedTexts:
        return EncodedTexts(self.tokenizer, examples, self.max_length, what)

    def _collator(self, training: bool) -> TextCollator:
        return TextCollator(self.tokenizer.pad_token_id, self.task.regression)
