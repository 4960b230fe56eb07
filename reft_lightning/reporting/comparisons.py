"""The results in a report: comparisons of methods, their scores, and pairs of methods."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from .runs import Run
from .statistics import Array, Part

AVERAGE = "average"
LOSS = "loss"
BASE = "frozen base"
CORRELATIONS = ("pearson", "spearman", "matthews", "combined_score")  # not fractions of rows
SIGNIFICANT = 0.05
ROWS_AND_SEEDS, ROWS_ONLY = "rows and seeds", "rows only"


@dataclass(eq=False)
class Score:
    """One measure of one method on one task."""

    task: str  # name, or `AVERAGE` over tasks
    measure: str
    values: dict[int, float]  # seed -> value
    rows: int | None = None  # evaluated with each seed; None without predictions
    interval: tuple[float, float] | None = None  # 95 %, over rows and seeds
    draws: Array | None = None  # (B,) values from the bootstrap of rows and seeds; None without rows
    row_draws: Array | None = None  # (B,) values from the bootstrap of rows only, means over seeds
    limits: tuple[float, float] = (-math.inf, math.inf)  # minimum and maximum of the measure
    row_scores: dict[int, Array] | None = None  # seed -> (n,) scores of rows, if the measure is their mean

    @property
    def diverged(self) -> list[int]:
        """Return the seeds whose value is not finite."""
        return sorted(seed for seed, value in self.values.items() if not math.isfinite(value))

    @property
    def mean(self) -> float:
        """Return the mean over seeds; NaN if one diverged."""
        return math.nan if self.diverged else float(np.mean(list(self.values.values())))

    @property
    def deviation(self) -> float | None:
        """Return the sample standard deviation over seeds; None for a single seed, or if one diverged."""
        if len(self.values) < 2 or self.diverged:
            return None
        return float(np.std(list(self.values.values()), ddof=1))

    def seed_part(self, pooled: Part = (0.0, 1.0)) -> Part | None:
        """Return the squared standard error of the mean over seeds and its degrees of freedom; None for one seed.

        A ``pooled`` variance over seeds, with its degrees of freedom, replaces the variance of these seeds if that is
        smaller.
        """
        if self.deviation is None:
            return None
        variance, freedom = max((self.deviation**2, len(self.values) - 1.0), pooled)
        return variance / len(self.values), freedom


@dataclass(eq=False)
class Method:
    """The runs of one configuration, one per seed; or the frozen base as evaluated by one of them."""

    label: str  # its name in tables
    runs: list[Run]  # by seed
    base: bool = False  # whether it is the frozen base, not a method of the runs
    scores: dict[tuple[str, str], Score] = field(default_factory=dict)  # (task, measure) -> score

    @property
    def seeds(self) -> list[int]:
        """Return the seeds of the runs; none for the frozen base, which has no seed."""
        return [] if self.base else [run.seed for run in self.runs]

    @property
    def edges(self) -> list[str]:
        """Return the edges of the search space that the settings are at, for the winner of a search."""
        if self.base:
            return []
        return list(dict.fromkeys(edge for run in self.runs for edge in run.winner.get("edges", ())))

    def cost(self, name: str) -> float | None:
        """Return the mean over seeds of a number in ``results.json``, or of ``adapter_bytes``; None if unknown."""
        if self.base:
            return 0.0 if name in ("trainable_parameters", "percent", "head_parameters") else None
        found = [run.adapter_bytes if name == "adapter_bytes" else run.results.get(name) for run in self.runs]
        numbers = [float(value) for value in found if isinstance(value, int | float)]
        return sum(numbers) / len(numbers) if numbers else None

    @property
    def trained(self) -> float | None:
        """Return the mean number of trained parameters, including those of a head; None if not recorded."""
        own = self.cost("trainable_parameters")
        return None if own is None else own + (self.cost("head_parameters") or 0.0)

    @property
    def trains(self) -> bool:
        """Whether anything is trained."""
        return bool(self.cost("steps"))


@dataclass(frozen=True)
class Pair:
    """Two methods on the same rows."""

    first: str  # label of a method
    second: str  # label of another method
    task: str
    measure: str
    difference: float  # mean of the first minus mean of the second
    interval: tuple[float, float]  # 95 %, over what `counted` says
    counted: str  # `ROWS_AND_SEEDS`, or `ROWS_ONLY` if a method has one seed
    p: float  # over what `counted` says
    p_holm: float  # adjusted over all pairs of methods on this task and measure
    rows_test: str  # `sign flips` or `paired bootstrap`, over rows given the trained models
    rows_p: float  # its p-value
    mcnemar: Mapping[int, float]  # seed -> exact p-value, if every score is 0 or 1

    @property
    def differs(self) -> bool:
        """Whether the methods differ significantly, after Holm."""
        return self.p_holm < SIGNIFICANT


@dataclass
class Comparison:
    """Methods on the same model, data and split."""

    title: str  # one line, unique among comparisons
    facts: dict[str, str]  # what all its runs share, in words
    split: str  # `test` or `validation`
    methods: list[Method]  # best first, once scored
    main: dict[str, str] = field(default_factory=dict)  # task -> the measure that decides
    pairs: list[Pair] = field(default_factory=list)  # of methods, on the main measures
    unequal: list[str] = field(default_factory=list)  # notes on budgets that differ
    notes: list[str] = field(default_factory=list)  # notes for the reader
    overlapped: bool = False  # whether runs ran at the same time

    @property
    def columns(self) -> list[tuple[str, str]]:
        """Return (task, measure) of the main measures, the average last."""
        mean = [(AVERAGE, next(iter(self.main.values())))] if self.has_average else []
        return [*self.main.items(), *mean]

    @property
    def has_average(self) -> bool:
        """Whether several tasks share one main measure, so that its mean over tasks is meaningful."""
        return len(self.main) > 1 and len(set(self.main.values())) == 1

    @property
    def head(self) -> tuple[str, str]:
        """Return the (task, measure) shown in plots and the summary: the average, or the first task."""
        return self.columns[-1] if self.has_average else self.columns[0]

    def best(self, column: tuple[str, str]) -> float:
        """Return the best mean of a column among methods that did not diverge; NaN without any."""
        means = [m.scores[column].mean for m in self.methods if column in m.scores]
        means = [mean for mean in means if math.isfinite(mean)] or [math.nan]
        return min(means) if lower_is_better(column[1]) else max(means)


def lower_is_better(measure: str) -> bool:
    """Whether a lower value of a measure is better."""
    return measure == LOSS
