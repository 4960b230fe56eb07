"""Measures of predictions under weighted rows.

Every measure is a function of sums over rows, or of ranks, so it can be recomputed for thousands of resamples at once;
with all weights 1 it is the value that the run itself reported (``agrees`` checks this).

Shapes: n rows, b weight vectors, c classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .comparisons import LOSS
from .statistics import Array, Measure

Row = Mapping[str, Any]
TOLERANCE = 1e-5  # runs log in float32
COMBINED, MAJORITY = "combined_score", "majority_accuracy"


@dataclass(frozen=True, eq=False)
class RowMean:
    """The mean of a score over rows."""

    scores: Array  # (n,)

    def value(self, weights: Array) -> Array:
        """Return the weighted mean."""
        return (weights @ self.scores) / weights.sum(1)


@dataclass(frozen=True, eq=False)
class TokenMean:
    """The mean loss over the target tokens of all rows."""

    losses: Array  # (n,) mean over the tokens of a row
    tokens: Array  # (n,)

    def value(self, weights: Array) -> Array:
        """Return the mean over the tokens of weighted rows."""
        return (weights @ (self.losses * self.tokens)) / (weights @ self.tokens)


@dataclass(frozen=True, eq=False)
class Pearson:
    """Pearson's correlation of predictions and gold scores; 0 if either is constant."""

    said: Array  # (n,)
    gold: Array  # (n,)

    def value(self, weights: Array) -> Array:
        """Return the correlation of weighted rows."""
        # centre first, as the sums of squares of raw values would cancel
        x, y = self.said - self.said.mean(), self.gold - self.gold.mean()
        sums = weights @ np.stack([x, y, x * x, y * y, x * y], 1)  # (b, 5)
        return _correlation(weights.sum(1), *sums.T)


@dataclass(frozen=True, eq=False)
class Spearman:
    """Spearman's correlation: Pearson's correlation of the ranks among the drawn rows."""

    said: Array  # (n,)
    gold: Array  # (n,)

    def value(self, weights: Array) -> Array:
        """Return the rank correlation of weighted rows; tied values share their mean rank."""
        total = weights.sum(1)
        # ranks around their mean, (total + 1) / 2
        x, y = (_ranks(values, weights) - (total[:, None] + 1) / 2 for values in (self.said, self.gold))
        wx, wy = weights * x, weights * y
        return _correlation(total, wx.sum(1), wy.sum(1), (wx * x).sum(1), (wy * y).sum(1), (wx * y).sum(1))


def _ranks(values: Array, weights: Array) -> Array:  # (n,), (b, n) -> (b, n)
    """Return the rank of each row if row j occurs weights[i, j] times in resample i."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    size = np.add.reduceat(weights[:, order], starts, axis=1)  # (b, groups)
    return (size.cumsum(1) - (size - 1) / 2)[:, group]


def _correlation(total: Array, x: Array, y: Array, xx: Array, yy: Array, xy: Array) -> Array:
    spread = (total * xx - x * x) * (total * yy - y * y)
    defined = spread > 1e-12 * np.maximum(total * total * xx * yy, 1e-300)
    return np.where(defined, (total * xy - x * y) / np.sqrt(np.where(defined, spread, 1)), 0.0)


@dataclass(frozen=True, eq=False)
class Matthews:
    """Matthews' correlation of classes, see ``evaluation.classifier_metrics.matthews``; 0 if it is undefined."""

    said: np.ndarray  # (n,) classes 0..c-1
    gold: np.ndarray  # (n,)
    classes: int

    def value(self, weights: Array) -> Array:
        """Return the coefficient of weighted rows."""
        said, gold = (np.eye(self.classes)[column] for column in (self.said, self.gold))
        p, t, right = weights @ said, weights @ gold, weights @ (said * gold).sum(1)
        total = weights.sum(1)
        spread = (total**2 - (p**2).sum(1)) * (total**2 - (t**2).sum(1))
        root = np.sqrt(np.where(spread > 0, spread, 1))
        return np.where(spread > 0, (right * total - (p * t).sum(1)) / root, 0.0)


@dataclass(frozen=True, eq=False)
class F1:
    """F1 of one of two classes, 2 TP / (2 TP + FP + FN); 0 if all three are 0."""

    said: Array  # (n,) 0 or 1
    gold: Array  # (n,)

    def value(self, weights: Array) -> Array:
        """Return F1 of weighted rows."""
        true, either = weights @ (self.said * self.gold), weights @ (self.said + self.gold)
        return np.where(either > 0, 2 * true / np.where(either > 0, either, 1), 0.0)


@dataclass(frozen=True, eq=False)
class Mean:
    """The mean of other measures, like GLUE's combination of two."""

    parts: tuple[Measure, ...]

    def value(self, weights: Array) -> Array:
        """Return the mean of the parts' values."""
        return np.mean([part.value(weights) for part in self.parts], axis=0)


def measures_of(
    rows: Sequence[Row], reported: Mapping[str, float], task: Mapping[str, Any]
) -> dict[str, Measure]:
    """Return the measures of one task that its predictions reproduce; ``task`` is what :meth:`.Run.task` returns.

    A measure whose reported value the predictions do not reproduce is left out, since an interval around another
    number would mislead.
    """
    found: dict[str, Measure] = {}
    for name, value in reported.items():
        measure = _measure(name, rows, task)
        if measure is not None and agrees(measure, len(rows), value):
            found[name] = measure
    if COMBINED in reported and found:
        combined = Mean(tuple(found.values()))
        if agrees(combined, len(rows), reported[COMBINED]):
            found[COMBINED] = combined
    return found


def limits(measure: Measure) -> tuple[float, float]:
    """Return the minimum and the maximum of a measure."""
    if isinstance(measure, Mean):
        ends = [limits(part) for part in measure.parts]
        return float(np.mean([low for low, _ in ends])), float(np.mean([high for _, high in ends]))
    if isinstance(measure, Pearson | Spearman | Matthews):
        return -1.0, 1.0
    if isinstance(measure, TokenMean):
        return 0.0, np.inf
    if isinstance(measure, RowMean) and (measure.scores.min() < 0 or measure.scores.max() > 1):
        return -np.inf, np.inf
    return 0.0, 1.0


def agrees(measure: Measure, rows: int, reported: float) -> bool:
    """Whether a measure with all weights 1 equals the reported value, up to rounding."""
    return math.isclose(measure.value(np.ones((1, rows)))[0], reported, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def _measure(name: str, rows: Sequence[Row], task: Mapping[str, Any]) -> Measure | None:
    """Return a measure by name: the mean of the rows' scores, or a function of all rows; None if unknown."""
    scores = [row.get("scores", {}).get(name) for row in rows]
    if all(isinstance(score, int | float) for score in scores):
        if name == LOSS:
            return TokenMean(np.array(scores), np.array([row["target_tokens"] for row in rows], float))
        return RowMean(np.array(scores, float))
    kind = task.get("kind")
    if kind == "regression" and name in ("pearson", "spearman"):
        # null becomes nan
        said, gold = (np.array([row[column] for row in rows], float) for column in ("value", "gold"))
        return (Pearson if name == "pearson" else Spearman)(said, gold)
    if kind == "classification" and name in ("f1", "matthews"):
        number = {label: i for i, label in enumerate(task["labels"])}
        gold = np.array([number[row["gold"]] for row in rows])
        wrong = (gold + 1) % len(number)  # for null answers: the model's outputs were not finite
        said = np.array([number.get(row["answer"], other) for row, other in zip(rows, wrong, strict=True)])
        if name == "matthews":
            return Matthews(said, gold, len(number))
        return F1(said.astype(float), gold.astype(float))
    return None
