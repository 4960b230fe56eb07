"""Intervals and paired tests of a comparison, from the predictions of its runs."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .comparisons import AVERAGE, BASE, LOSS, Comparison, Method, Pair, Score
from .runs import ReportError, Run
from .scores import MAJORITY, Mean, RowMean, measures_of
from .statistics import (
    Array,
    Measure,
    bootstrap_p,
    holm,
    mcnemar,
    over_seeds,
    percentile_interval,
    resample_rows,
    seed_weights,
    sign_flip_tests,
)

Key = tuple[str, int]
Rows = Mapping[Key, Mapping[str, Any]]
RESAMPLES = 10_000
RESOLUTION = 100  # sign flips a pair: the smallest p-value stays below 0.01 after Holm


def add_evidence(
    comparison: Comparison,
    resamples: int = RESAMPLES,
    seed: int = 0,
    advance: Callable[[float], None] = lambda share: None,
) -> None:
    """Fill in intervals and pairs.

    The draws of rows depend on seed, task and rows alone, those of seeds on the method besides: another method in the
    table changes nobody's interval.

    Args:
        comparison: as `comparisons.compare` makes it.
        resamples: of the bootstrap and of the sign flips.
        seed: of the draws.
        advance: is told which share of the work was done since the last call.

    Raises:
        ReportError: if two runs were evaluated on other rows; names both.
    """
    rows = {id(method): _predictions(method, comparison.split) for method in comparison.methods}
    for task in comparison.main:
        loaded = [
            (m, run, rows[id(m)][i].get(task)) for m in comparison.methods for i, run in enumerate(m.runs)
        ]
        _check_rows(task, [(run, found) for _, run, found in loaded if found])
        _score_task(comparison, task, loaded, resamples, seed, advance)
    if comparison.has_average:
        _average(comparison)
    comparison.pairs = pairs_of(comparison, resamples, seed)
    flat = [
        method.label for method in comparison.methods
        if (score := method.scores.get(comparison.head)) and score.interval and score.interval[0] == score.interval[1]
    ]  # fmt: skip
    if flat:
        comparison.notes.append(
            f"the interval of {', '.join(flat)} has no width, as every resample gave the same: that is no certainty"
        )


def _predictions(method: Method, split: str) -> list[Mapping[str, Rows]]:
    return [run.predictions(split, method.base) for run in method.runs]


def _check_rows(task: str, found: Sequence[tuple[Run, Rows]]) -> None:
    for run, rows in found[1:]:
        first, expected = found[0]
        alone = sorted(rows.keys() ^ expected.keys())
        if alone:
            raise ReportError(
                f"{first.folder} and {run.folder} were evaluated on other rows of {task}: {len(alone)} are in one "
                f"alone, such as {alone[0][0]!r}; runs are compared on the same rows only"
            )
        other = next((key for key in rows if rows[key].get("gold") != expected[key].get("gold")), None)
        if other:
            raise ReportError(
                f"{first.folder} and {run.folder} have other gold answers of {task}, {other[0]}: "
                f"{expected[other].get('gold')!r} and {rows[other].get('gold')!r}"
            )


Entry = tuple[Score, int, Measure]  # of one score: a seed and its measure


def _entries(
    comparison: Comparison, task: str, loaded: Sequence[tuple[Method, Run, Rows | None]]
) -> list[Entry]:
    """Return the measures that can be resampled; a note says which cannot."""
    found: list[Entry] = []
    for method, run, rows in loaded:
        scores = {m: s for (t, m), s in method.scores.items() if t == task}
        reported = {m: s.values[run.seed] for m, s in scores.items() if run.seed in s.values}
        measures = measures_of(list(rows.values()), reported) if rows else {}
        for name in sorted(reported.keys() - {MAJORITY, LOSS} - measures.keys()):
            comparison.notes.append(
                f"{method.label}, seed {run.seed}: the predictions do not give {name} of {task} as results.json has "
                "it, so there is no interval"
            )
        found += [(scores[name], run.seed, measure) for name, measure in measures.items()]
    return found


def _score_task(
    comparison: Comparison,
    task: str,
    loaded: Sequence[tuple[Method, Run, Rows | None]],
    resamples: int,
    seed: int,
    advance: Callable[[float], None],
) -> None:
    entries = _entries(comparison, task, loaded)
    share = 1 / len(comparison.main)
    if not entries:
        advance(share)
        return
    rows = next(len(found) for *_, found in loaded if found)
    draws = _draws(
        [measure for *_, measure in entries], rows, resamples, _generator(seed, "rows", task),
        lambda done: advance(done / resamples * share),
    )  # fmt: skip
    for method in comparison.methods:
        weights = seed_weights(len(method.runs), resamples, _generator(seed, "seeds", _identity(method)))
        for score in (s for (t, _), s in method.scores.items() if t == task):
            own = {s: measure for other, s, measure in entries if other is score}
            if len(own) == len(method.runs):
                score.rows = rows
                score.draws = over_seeds(np.stack([draws[id(m)] for m in own.values()], 1), weights)
                score.interval = percentile_interval(score.draws)
                means = {s: m.scores for s, m in own.items() if isinstance(m, RowMean)}
                score.row_scores = means if len(means) == len(own) else None


def _draws(
    measures: Sequence[Measure],
    rows: int,
    resamples: int,
    rng: np.random.Generator,
    advance: Callable[[int], None],
) -> dict[int, Array]:
    """Return id of a measure -> its (B,) resampled values; a mean of others comes from theirs."""
    single = [measure for measure in measures if not isinstance(measure, Mean)]
    values = resample_rows(single, rows, resamples, rng, advance)
    found = {id(measure): values[:, k] for k, measure in enumerate(single)}
    for measure in measures:
        if isinstance(measure, Mean):
            found[id(measure)] = np.mean([found[id(part)] for part in measure.parts], axis=0)
    return found


def _identity(method: Method) -> str:
    """Return what tells a method's draws of seeds from another's, the same in later versions of the schema."""
    run = method.runs[0]
    return BASE if method.base else str(run.results.get("config_hash") or run.configuration)


def _generator(seed: int, *names: str) -> np.random.Generator:
    return np.random.default_rng([seed, *(zlib.crc32(name.encode()) for name in names)])


def _average(comparison: Comparison) -> None:
    """Resample the mean over tasks: rows of each task by themselves, seeds for all tasks together."""
    column = comparison.columns[-1]
    for method in comparison.methods:
        parts = [method.scores.get(item) for item in comparison.main.items()]
        draws = [part.draws for part in parts if part is not None and part.draws is not None]
        if column in method.scores and len(draws) == len(parts):
            score = method.scores[column]
            score.rows = sum(part.rows or 0 for part in parts if part is not None)
            score.draws = np.mean(draws, axis=0)
            score.interval = percentile_interval(score.draws)


def pairs_of(comparison: Comparison, resamples: int, seed: int) -> list[Pair]:
    """Return every pair of methods on every main measure, p-values adjusted over the pairs of one measure."""
    found: list[Pair] = []
    for column in comparison.columns:
        methods = [m for m in comparison.methods if column in m.scores and m.scores[column].draws is not None]
        couples = list(itertools.combinations(methods, 2))
        differences = [_row_differences(comparison, a, b, column) for a, b in couples]
        exact = [d for d in differences if d is not None]
        # with fewer flips the smallest p-value, adjusted over many pairs, would not be small
        flips = max(resamples, RESOLUTION * len(couples))
        flipped = iter(
            sign_flip_tests(np.stack(exact), flips, _generator(seed, "signs", *column)) if exact else []
        )
        pairs = []
        for (a, b), difference in zip(couples, differences, strict=True):
            first, second = a.scores[column], b.scores[column]
            draws = first.draws - second.draws  # the same resamples of rows
            pairs.append({
                "first": a.label, "second": b.label, "task": column[0], "measure": column[1],
                "difference": first.mean - second.mean, "interval": percentile_interval(draws),
                "test": "paired bootstrap" if difference is None else "sign flips",
                "p": bootstrap_p(draws) if difference is None else next(flipped),
                "mcnemar": _mcnemar(a, b, column),
            })  # fmt: skip
        adjusted = holm([pair["p"] for pair in pairs])
        found += [Pair(**pair, p_holm=p) for pair, p in zip(pairs, adjusted, strict=True)]
    return found


def _row_differences(comparison: Comparison, a: Method, b: Method, column: tuple[str, str]) -> Array | None:
    """Return each row's difference of scores, averaged over seeds; of an average each task counts the same.

    None where a measure is no mean over rows.
    """
    if column[0] != AVERAGE:
        scores = [method.scores[column].row_scores for method in (a, b)]
        if scores[0] is None or scores[1] is None:
            return None
        first, second = (np.mean(list(s.values()), axis=0) for s in scores if s is not None)
        return first - second
    parts = [_row_differences(comparison, a, b, item) for item in comparison.main.items()]
    known = [part / len(part) for part in parts if part is not None]
    return np.concatenate(known) if len(known) == len(parts) else None


def _mcnemar(a: Method, b: Method, column: tuple[str, str]) -> dict[int, float]:
    """Return seed -> exact p-value; the frozen base stands against every seed of the other."""
    first, second = a.scores[column].row_scores, b.scores[column].row_scores
    if first is None or second is None:
        return {}
    if any(np.any((s != 0) & (s != 1)) for scores in (first, second) for s in scores.values()):
        return {}
    base_a, base_b = (
        next(iter(scores.values())) if m.base else None for m, scores in ((a, first), (b, second))
    )
    seeds = sorted(first.keys() & second.keys() if base_a is None and base_b is None
                   else (second if base_a is not None else first).keys())  # fmt: skip
    return {
        s: mcnemar(base_a if base_a is not None else first[s], base_b if base_b is not None else second[s])
        for s in seeds
    }
