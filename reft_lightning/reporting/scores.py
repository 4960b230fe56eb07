"""Measures of predictions under weighted rows.

Every measure is a function of sums over rows, or of ranks, so that it can be recomputed for thousands of resamples
at once; with all weights 1 it is the value that the run itself reported (`agrees` says so).

Shapes: n rows, b weight vectors, c classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .statistics import Array, Measure

Row = Mapping[str, Any]
TOLERANCE = 1e-3  # of correlations, whose predictions are written with four decimals
COMBINED, MAJORITY = "combined_score", "majority_accuracy"


@dataclass(frozen=True)
class RowMean:
    """The mean of a score over rows."""

    scores: Array  # (n,)

    def value(self, weights: Array) -> Array:
        """Return the weighted mean."""
        return (weights @ self.scores) / weights.sum(1)


@dataclass(frozen=True)
class Pearson:
    """Pearson's correlation of predictions and gold scores; 0 where either is constant."""

    said: Array  # (n,)
    gold: Array  # (n,)

    def value(self, weights: Array) -> Array:
        """Return the correlation of weighted rows."""
        # centred first: the sums of squares of raw values would cancel
        x, y = self.said - self.said.mean(), self.gold - self.gold.mean()
        sums = weights @ np.stack([x, y, x * x, y * y, x * y], 1)  # (b, 5)
        return _correlation(weights.sum(1), *sums.T)


@dataclass(frozen=True)
class Spearman:
    """Spearman's correlation: Pearson's of the ranks that the drawn rows have among themselves."""

    said: Array  # (n,)
    gold: Array  # (n,)

    def value(self, weights: Array) -> Array:
        """Return the rank correlation of weighted rows, tied values sharing their mean rank."""
        total = weights.sum(1)
        # ranks around their mean, (total + 1) / 2
        x, y = (_ranks(values, weights) - (total[:, None] + 1) / 2 for values in (self.said, self.gold))
        wx, wy = weights * x, weights * y
        return _correlation(total, wx.sum(1), wy.sum(1), (wx * x).sum(1), (wy * y).sum(1), (wx * y).sum(1))


def _ranks(values: Array, weights: Array) -> Array:  # (n,), (b, n) -> (b, n)
    """Return the rank of each row where row j stands weights[i, j] times in line i."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    size = np.add.reduceat(weights[:, order], starts, axis=1)  # (b, groups)
    return (size.cumsum(1) - (size - 1) / 2)[:, group]


def _correlation(total: Array, x: Array, y: Array, xx: Array, yy: Array, xy: Array) -> Array:
    spread = (total * xx - x * x) * (total * yy - y * y)
    defined = spread > 1e-12 * np.maximum(total * total * xx * yy, 1e-300)
    return np.where(defined, (total * xy - x * y) / np.sqrt(np.where(defined, spread, 1)), 0.0)


@dataclass(frozen=True)
class Matthews:
    """Matthews' correlation of classes, see `evaluation.labels.matthews`; 0 where it is undefined."""

    said: np.ndarray  # (n,) classes 0..c-1
    gold: np.ndarray  # (n,)
    classes: int

    def value(self, weights: Array) -> Array:
        """Return the coefficient of weighted rows."""
        said, gold = (np.eye(self.classes)[column] for column in (self.said, self.gold))
        p, t, right = weights @ said, weights @ gold, weights @ (said * gold).sum(1)
        total = weights.sum(1)
        spread = (total**2 - (p**2).sum(1)) * (total**2 - (t**2).sum(1))
        return np.where(
            spread > 0, (right * total - (p * t).sum(1)) / np.sqrt(np.where(spread > 0, spread, 1)), 0.0
        )


@dataclass(frozen=True)
class F1:
    """F1 of one class of two, 2 TP / (2 TP + FP + FN); 0 without any of them."""

    said: Array  # (n,) 0 or 1
    gold: Array  # (n,)

    def value(self, weights: Array) -> Array:
        """Return F1 of weighted rows."""
        true, either = weights @ (self.said * self.gold), weights @ (self.said + self.gold)
        return np.where(either > 0, 2 * true / np.where(either > 0, either, 1), 0.0)


@dataclass(frozen=True)
class Mean:
    """The mean of other measures, as GLUE combines two."""

    parts: tuple[Measure, ...]

    def value(self, weights: Array) -> Array:
        """Return the mean of the parts' values."""
        return np.mean([part.value(weights) for part in self.parts], axis=0)


def measures_of(rows: Sequence[Row], reported: Mapping[str, float]) -> dict[str, Measure]:
    """Return the measures of one task that its predictions carry.

    Args:
        rows: predictions of one task, each with what `reft-train` writes.
        reported: measure -> value in `results.json`; one that the predictions do not give again is left out, since an
            interval around another number would mislead.
    """
    found: dict[str, Measure] = {}
    for name in reported:
        measure = None if name == MAJORITY else _measure(name, rows)
        if measure is not None:
            found[name] = measure
    found = {name: measure for name, measure in found.items() if agrees(measure, len(rows), reported[name])}
    if COMBINED in reported and found:
        combined = Mean(tuple(found.values()))
        if agrees(combined, len(rows), reported[COMBINED]):
            found[COMBINED] = combined
    return found


def limits(measure: Measure) -> tuple[float, float]:
    """Return the least and the greatest value that a measure can have."""
    if isinstance(measure, Mean):
        ends = [limits(part) for part in measure.parts]
        return float(np.mean([low for low, _ in ends])), float(np.mean([high for _, high in ends]))
    if isinstance(measure, Pearson | Spearman | Matthews):
        return -1.0, 1.0
    if isinstance(measure, RowMean) and (measure.scores.min() < 0 or measure.scores.max() > 1):
        return -np.inf, np.inf
    return 0.0, 1.0


def agrees(measure: Measure, rows: int, reported: float) -> bool:
    """Whether a measure of rows that all count once is the reported one, up to the rounding of what is written."""
    slack = 1e-5 if isinstance(measure, RowMean) else TOLERANCE
    return bool(abs(float(measure.value(np.ones((1, rows)))[0]) - reported) <= slack)


def _measure(name: str, rows: Sequence[Row]) -> Measure | None:
    """Return a measure by name; None where the rows do not hold what it takes."""
    first = rows[0]
    if name in first:
        return _row_mean([row.get(name) for row in rows])
    if name == "option_accuracy" and "option" in first:
        return RowMean(np.array([float(row.get("option") == row["gold"]) for row in rows]))
    if name in ("pearson", "spearman") and "error" in first:
        said, gold = (np.array([float(row[column]) for row in rows]) for column in ("answer", "gold"))
        return (Pearson if name == "pearson" else Spearman)(said, gold)
    if name in ("f1", "matthews") and "logits" in first:
        classes = class_names(rows)
        said, gold = (np.array([classes.index(row[column]) for row in rows]) for column in ("answer", "gold"))
        if name == "matthews":
            return Matthews(said, gold, len(classes))
        return F1(said.astype(float), gold.astype(float)) if len(classes) == 2 else None
    if name != COMBINED and "correct" in first:  # the family's one measure, or a classifier's accuracy
        return _row_mean([row.get("correct") for row in rows])
    return None


def _row_mean(values: Sequence[Any]) -> RowMean | None:
    if any(not isinstance(value, bool | int | float) for value in values):
        return None
    return RowMean(np.array([float(value) for value in values]))


def class_names(rows: Sequence[Row]) -> list[str]:
    """Return the names of a classifier's classes in the order of its logits, as far as predictions show them.

    A class that nothing was taken for has no logit that names it: it gets one of the numbers left.
    """
    width = len(rows[0]["logits"])
    names: list[str | None] = [None] * width
    for row in rows:
        best = int(np.argmax(row["logits"]))
        if sorted(row["logits"])[-1] > sorted(row["logits"])[-2]:  # rounded logits may tie
            names[best] = row["answer"]
    for name in sorted({row[key] for row in rows for key in ("gold", "answer")} - set(names)):
        names[names.index(None)] = name
    return [name if name is not None else f"class {i}" for i, name in enumerate(names)]
