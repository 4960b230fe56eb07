"""Paired tests of all pairs of methods in a comparison, on the same rows and over seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .comparisons import AVERAGE, ROWS_AND_SEEDS, ROWS_ONLY, SIGNIFICANT, Comparison, Method, Pair, Score
from .statistics import (
    Array,
    Part,
    bootstrap_p,
    generator,
    holm,
    mcnemar,
    satterthwaite,
    sign_flip_tests,
    widest_t,
    within,
)

RESOLUTION = 100  # sign flips per pair: the smallest p-value stays below 0.01 after Holm


def pairs_of(comparison: Comparison, resamples: int, seed: int) -> list[Pair]:
    """Return every pair of methods on every main measure, with p-values adjusted over the pairs of one measure.

    With two or three seeds Welch's test has so few degrees of freedom that hardly any of many pairs remains after Holm.
    Therefore each method's variance over seeds is at least the mean variance over the table. That mean is estimated
    better than a single method's variance, with Satterthwaite's degrees of freedom, which bound those of every pair.
    For two methods this is Welch's test with a larger error.

    The probability of any false pair is 0.000 to 0.056, with Welch's test 0.013 to 0.065 (6,000 simulated tables each
    of 2 to 9 equal means, 2 to 5 seeds, equal and unequal variances: ``experiments/pooled_seeds``). If one of nine
    methods is ten spreads better, 89 % of its pairs are found with three seeds, with Welch's test 66 %; if spreads
    differ a lot, Welch's test finds more among few methods. Nor do two methods differ if the same test over seeds alone
    does not distinguish them, see :func:`widest_t`.
    """
    found: list[Pair] = []
    for column in comparison.columns:
        methods = [m for m in comparison.methods if column in m.scores and m.scores[column].draws is not None]
        couples = list(itertools.combinations(methods, 2))
        differences = [_row_differences(comparison, a, b, column) for a, b in couples]
        exact = [_line(lines) for lines in differences if lines]
        # with fewer flips even the smallest p-value would not be small after adjusting over many pairs
        flips = max(resamples, RESOLUTION * len(couples))
        flipped = iter(
            sign_flip_tests(np.stack(exact), flips, generator(seed, "signs", *column)) if exact else []
        )
        pooled = _pooled([m.scores[column] for m in methods])
        pairs = [
            _pair(a, b, column, pooled, lines, next(flipped) if lines else None)
            for (a, b), lines in zip(couples, differences, strict=True)
        ]
        adjusted = holm([pair.p for pair in pairs])
        found += [replace(pair, p_holm=p) for pair, p in zip(pairs, adjusted, strict=True)]
    return found


def _pooled(scores: Sequence[Score]) -> Part:
    """Return the mean of the variances over seeds, with Satterthwaite's degrees of freedom."""
    own = [(s.deviation**2, len(s.values) - 1.0) for s in scores if s.deviation is not None]
    if not own:
        return 0.0, 1.0
    root, freedom = satterthwaite(own)
    return root**2 / len(own), freedom


def _pair(
    a: Method,
    b: Method,
    column: tuple[str, str],
    pooled: Part,
    lines: Sequence[Array],
    flipped: float | None,
) -> Pair:
    """Return a pair whose p-value is not yet adjusted.

    Over rows and seeds p is Welch's, but at least that over seeds alone and, if every row has its own score, at least
    that of the sign flips, which is valid even if few rows differ. If a method has one seed, only rows are counted.
    The interval excludes 0 exactly if p < 0.05, before Holm: if t alone would exclude it, the interval ends at 0.

    ``pooled`` is the mean variance over seeds, a lower bound for each method's. ``lines`` are each row's differences,
    task by task, empty if the measure is not a mean over rows; ``flipped`` is the p-value of their sign flips.
    """
    first: Any = a.scores[column]
    second: Any = b.scores[column]
    draws = first.row_draws - second.row_draws  # the same resamples of rows
    difference = first.mean - second.mean
    rows_p = bootstrap_p(draws) if flipped is None else flipped
    rows = _rows_part(lines, draws, first.rows or 0)
    both = [score.seed_part(pooled) for score in (first, second)]
    several = all(method.base or part is not None for method, part in zip((a, b), both, strict=True))
    tests = [satterthwaite([rows])]
    if several:
        error, freedom = satterthwaite([part for part in both if part is not None])
        seeds = error**2, min(freedom, pooled[1])
        tests = [satterthwaite([rows, seeds]), satterthwaite([seeds])]
    p, ends = widest_t(difference, tests)
    if flipped is not None or not any(test[0] for test in tests):
        p = max(p, rows_p)
    if p >= SIGNIFICANT:
        ends = min(ends[0], 0.0), max(ends[1], 0.0)
    bounds = first.limits[0] - second.limits[1], first.limits[1] - second.limits[0]
    return Pair(
        first=a.label, second=b.label, task=column[0], measure=column[1], difference=difference,
        interval=within(bounds, ends), counted=ROWS_AND_SEEDS if several else ROWS_ONLY, p=p, p_holm=p,
        rows_test="paired bootstrap" if flipped is None else "sign flips", rows_p=rows_p,
        mcnemar=_mcnemar(a, b, column),
    )  # fmt: skip


def _rows_part(lines: Sequence[Array], draws: Array, rows: int) -> Part:
    """Return a difference's variance over rows and its degrees of freedom; without lines from the bootstrap."""
    if rows < 2 or any(len(line) < 2 for line in lines):
        return math.inf, 1.0
    if not lines:
        return float(draws.var(ddof=1)), rows - 1.0
    variance = sum(float(line.var(ddof=1)) / len(line) for line in lines) / len(lines) ** 2
    return variance, float(sum(len(line) - 1 for line in lines))


def _line(lines: Sequence[Array]) -> Array:
    """Return the differences of all tasks as one line, in which each task has the same weight."""
    return np.concatenate([line / len(line) for line in lines])


def _row_differences(comparison: Comparison, a: Method, b: Method, column: tuple[str, str]) -> list[Array]:
    """Return the differences of row scores, averaged over seeds, for each task of a column.

    The list is empty if a measure is not a mean over rows.
    """
    columns = list(comparison.main.items()) if column[0] == AVERAGE else [column]
    found: list[Array] = []
    for one in columns:
        first, second = (method.scores[one].row_scores for method in (a, b))
        if first is None or second is None:
            return []
        found.append(np.mean(list(first.values()), axis=0) - np.mean(list(second.values()), axis=0))
    return found


def _mcnemar(a: Method, b: Method, column: tuple[str, str]) -> dict[int, float]:
    """Return seed -> exact p-value; the frozen base is compared with every seed of the other."""
    first, second = a.scores[column].row_scores, b.scores[column].row_scores
    if first is None or second is None:
        return {}
    if any(np.any((s != 0) & (s != 1)) for s in (*first.values(), *second.values())):
        return {}
    if a.base:
        first = dict.fromkeys(second, next(iter(first.values())))
    elif b.base:
        second = dict.fromkeys(first, next(iter(second.values())))
    return {seed: mcnemar(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())}
