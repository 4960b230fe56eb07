"""Paired tests of every two methods of a comparison, on the same rows and over seeds."""

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

RESOLUTION = 100  # sign flips a pair: the smallest p-value stays below 0.01 after Holm


def pairs_of(comparison: Comparison, resamples: int, seed: int) -> list[Pair]:
    """Return every pair of methods on every main measure, p-values adjusted over the pairs of one measure.

    With two or three seeds Welch's test has so few degrees of freedom that hardly a pair of many is left after Holm. So
    no method's variance over seeds counts as smaller than the mean over the table. That mean is known better than one
    method's variance, with Satterthwaite's degrees of freedom, and no pair has more than it. Of two methods this is
    Welch's test with a larger error.

    The chance of any false pair is 0.000 to 0.056, by Welch's test 0.013 to 0.065 (6,000 simulated tables each of 2 to
    9 equal means, 2 to 5 seeds, equal and unequal variances: ``experiments/pooled_seeds``). One of nine methods that is
    ten spreads better is found in 89 % of its pairs with three seeds, by Welch's test in 66 %; where spreads differ
    much, Welch's test finds more of few methods. Nor do two methods differ if the same test over seeds
    alone does not tell them apart, see :func:`widest_t`.
    """
    found: list[Pair] = []
    for column in comparison.columns:
        methods = [m for m in comparison.methods if column in m.scores and m.scores[column].draws is not None]
        couples = list(itertools.combinations(methods, 2))
        differences = [_row_differences(comparison, a, b, column) for a, b in couples]
        exact = [_line(lines) for lines in differences if lines]
        # with fewer flips the smallest p-value, adjusted over many pairs, would not be small
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
    """Return a pair, its p-value not yet adjusted.

    Over rows and seeds p is Welch's, never below that over seeds alone; and where every row has a score of its own
    never below that of the sign flips, which holds for few rows that differ too. Where a method has one seed, rows
    alone are counted. The interval leaves out 0 where p < 0.05, before Holm, and only there: where t alone would
    leave it out, it ends at 0.

    `pooled` is the mean variance over seeds, the least that is counted. `lines` are each row's differences, task by
    task, none where the measure is no mean over rows; `flipped` is the p-value of their sign flips.
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
    """Return the variance that rows give a difference, with its degrees of freedom; without lines the bootstrap's."""
    if rows < 2 or any(len(line) < 2 for line in lines):
        return math.inf, 1.0
    if not lines:
        return float(draws.var(ddof=1)), rows - 1.0
    variance = sum(float(line.var(ddof=1)) / len(line) for line in lines) / len(lines) ** 2
    return variance, float(sum(len(line) - 1 for line in lines))


def _line(lines: Sequence[Array]) -> Array:
    """Return the differences of all tasks as one line, in which each task counts the same."""
    return np.concatenate([line / len(line) for line in lines])


def _row_differences(comparison: Comparison, a: Method, b: Method, column: tuple[str, str]) -> list[Array]:
    """Return of each task of a column each row's difference of scores, averaged over seeds.

    Nothing where a measure is no mean over rows.
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
    """Return seed -> exact p-value; the frozen base stands against every seed of the other."""
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
