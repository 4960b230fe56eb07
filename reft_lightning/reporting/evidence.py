"""Intervals and paired tests of a comparison, from the predictions of its runs."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .comparisons import (
    AVERAGE,
    BASE,
    LOSS,
    ROWS_AND_SEEDS,
    ROWS_ONLY,
    SIGNIFICANT,
    Comparison,
    Method,
    Pair,
    Score,
)
from .runs import LeftOut, ReportError, Run
from .scores import MAJORITY, Mean, RowMean, limits, measures_of
from .statistics import (
    LEVEL,
    Array,
    Measure,
    Part,
    bootstrap_p,
    holm,
    mcnemar,
    over_seeds,
    percentile_interval,
    resample_rows,
    satterthwaite,
    seed_weights,
    sign_flip_tests,
    widest_t,
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
    """Fill in intervals and pairs, of runs that :func:`deviating` found nothing against.

    The draws of rows depend on seed, task and rows alone, those of seeds on the method besides: another method in the
    table changes nobody's interval.

    Args:
        comparison: as `comparisons.compare` makes it.
        resamples: of the bootstrap and of the sign flips.
        seed: of the draws.
        advance: is told which share of the work was done since the last call.
    """
    rows = {
        id(method): [run.predictions(comparison.split, method.base) for run in method.runs]
        for method in comparison.methods
    }
    for task in comparison.main:
        loaded = [
            (m, run, rows[id(m)][i].get(task)) for m in comparison.methods for i, run in enumerate(m.runs)
        ]
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


Gold = Mapping[Key, Any]


def deviating(comparison: Comparison) -> list[LeftOut]:
    """Return the runs of a comparison whose predictions cannot be read, or are of other rows than those of most.

    Where as many runs have the one rows as the other, those of the run that finished first count.
    """
    found: dict[str, list[tuple[Run, Gold]]] = {}
    left: dict[int, LeftOut] = {}
    runs = [(run, method.base) for method in comparison.methods for run in method.runs]
    for run, base in sorted(
        runs, key=lambda pair: (str(pair[0].results.get("finished")), str(pair[0].folder))
    ):
        try:
            predictions = run.predictions(comparison.split, base)
        except ReportError as error:
            left.setdefault(id(run), LeftOut(run.folder, str(error)))
            continue
        for task in predictions.keys() & comparison.main.keys():
            gold = {key: row.get("gold") for key, row in predictions[task].items()}
            found.setdefault(task, []).append((run, gold))
    for task in sorted(found):
        groups: list[list[tuple[Run, Gold]]] = []
        for run, gold in found[task]:
            same = next((group for group in groups if group[0][1] == gold), None)
            if same is None:
                groups.append([(run, gold)])
            else:
                same.append((run, gold))
        most = max(groups, key=len)
        for run, gold in (one for group in groups if group is not most for one in group):
            left.setdefault(id(run), LeftOut(run.folder, _deviation(task, *most[0], gold)))
    return list(left.values())


def _deviation(task: str, standard: Run, expected: Gold, gold: Gold) -> str:
    """Say how the rows of a run differ from those that count."""
    alone = sorted(gold.keys() ^ expected.keys())
    if alone:
        return (
            f"it was evaluated on other rows of {task} than {standard.folder}: {len(alone)} are in one alone, such as "
            f"{alone[0][0]!r}; runs are compared on the same rows only"
        )
    other = next(key for key in gold if gold[key] != expected[key])
    return (
        f"it has other gold answers of {task} than {standard.folder}, {other[0]}: {gold[other]!r} and "
        f"{expected[other]!r}"
    )


Entry = tuple[Score, int, Measure]  # of one score: a seed and its measure


def _entries(
    comparison: Comparison, task: str, loaded: Sequence[tuple[Method, Run, Rows | None]]
) -> list[Entry]:
    """Return the measures that can be resampled; a note says which cannot."""
    found: list[Entry] = []
    for method, run, rows in loaded:
        scores = {m: s for (t, m), s in method.scores.items() if t == task}
        reported = {
            m: s.values[run.seed] for m, s in scores.items()
            if run.seed in s.values and run.seed not in s.diverged
        }  # fmt: skip
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
                by_seed = np.stack([draws[id(m)] for m in own.values()], 1)
                score.draws, score.row_draws = over_seeds(by_seed, weights), by_seed.mean(1)
                score.limits = limits(next(iter(own.values())))
                means = {s: m.scores for s, m in own.items() if isinstance(m, RowMean)}
                score.row_scores = means if len(means) == len(own) else None
                score.interval = _interval(score)


def _interval(score: Score) -> tuple[float, float]:
    """Return the 95 % interval: of one seed the bootstrap's percentiles, of several Student's by the bootstrap's error.

    Of few seeds the percentiles would be far too narrow, as three seeds know their own spread badly; nor is the
    interval ever narrower than Student's over the seeds alone, see :func:`widest_t`. Where every row is right, or
    wrong, no resample differs: then it is Wilson's, as `reft-train` prints it.
    """
    if score.draws is None or score.row_draws is None or score.rows is None:
        raise ValueError(f"{score.task} {score.measure} has no resamples")
    seeds = score.seed_part()
    if seeds is None:
        ends = percentile_interval(score.draws)
    else:
        rows = float(score.row_draws.var(ddof=1)), max(score.rows - 1.0, 1.0)
        _, freedom = satterthwaite([rows, seeds])
        both = float(score.draws.std(ddof=1)), freedom
        ends = _within(score.limits, widest_t(score.mean, [both, satterthwaite([seeds])])[1])
    return _wilson(score) if _one_answer(score) else ends


def _one_answer(score: Score) -> bool:
    """Whether a share of rows is 0 or 1 in every seed, so that resamples of rows and seeds know no spread."""
    return score.row_scores is not None and score.mean in (0.0, 1.0) and all(
        np.all(scores == score.mean) for scores in score.row_scores.values()
    )  # fmt: skip


def _wilson(score: Score) -> tuple[float, float]:
    """Return what `evaluation.metrics.wilson_interval` gives of none or all of n rows, without loading torch."""
    from scipy.special import ndtri

    z2, rows = float(ndtri((1 + LEVEL) / 2)) ** 2, score.rows or 0
    reach = z2 / (rows + z2)
    return (0.0, reach) if score.mean == 0 else (1 - reach, 1.0)


def _within(limits: tuple[float, float], ends: tuple[float, float]) -> tuple[float, float]:
    return max(ends[0], limits[0]), min(ends[1], limits[1])


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
        known = [part for part in parts if part is not None and part.draws is not None]
        if column in method.scores and len(known) == len(parts):
            score = method.scores[column]
            score.rows = sum(part.rows or 0 for part in known)
            score.draws = np.mean([part.draws for part in known], axis=0)
            score.row_draws = np.mean([part.row_draws for part in known], axis=0)
            score.limits = tuple(np.mean([part.limits for part in known], axis=0).tolist())
            score.interval = _interval(score)
            if score.interval[0] == score.interval[1]:  # all rows of all tasks are right, or wrong
                score.interval = tuple(np.mean([part.interval for part in known], axis=0).tolist())


def pairs_of(comparison: Comparison, resamples: int, seed: int) -> list[Pair]:
    """Return every pair of methods on every main measure, p-values adjusted over the pairs of one measure.

    Among many methods of two or three seeds some have hardly any spread by chance, and Welch's test alone would tell
    them from others: of nine equal methods with two seeds in up to a quarter of tables. So no method's variance over
    seeds counts as smaller than the mean of those in the table, which keeps the chance of any false pair below 0.05,
    also where the variances do differ. Nor is a pair told apart that the same test over the seeds alone does not tell
    apart, see :func:`widest_t`. By itself, before Holm, a pair of equal methods has p < 0.05 in up to 5.7 % of tables
    where deviations over seeds differ threefold; in 9 % where a table has but two methods of two seeds, one with ten
    times the deviation of the other (40,000 simulated tables each).
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
            sign_flip_tests(np.stack(exact), flips, _generator(seed, "signs", *column)) if exact else []
        )
        variances = [s**2 for m in methods if (s := m.scores[column].deviation) is not None]
        least = float(np.mean(variances)) if variances else 0.0
        pairs = [
            _pair(a, b, column, least, lines, next(flipped) if lines else None)
            for (a, b), lines in zip(couples, differences, strict=True)
        ]
        adjusted = holm([pair.p for pair in pairs])
        found += [replace(pair, p_holm=p) for pair, p in zip(pairs, adjusted, strict=True)]
    return found


def _pair(
    a: Method,
    b: Method,
    column: tuple[str, str],
    least: float,
    lines: Sequence[Array],
    flipped: float | None,
) -> Pair:
    """Return a pair, its p-value not yet adjusted.

    Over rows and seeds p is Welch's, never below that over seeds alone; and where every row has a score of its own
    never below that of the sign flips, which holds for few rows that differ too. Where a method has one seed, rows
    alone are counted. The interval leaves out 0 where p < 0.05, before Holm, and only there: where t alone would
    leave it out, it ends at 0.

    Args:
        a: the one method.
        b: the other.
        column: task and measure.
        least: variance over seeds that is counted.
        lines: of each task each row's difference; empty where the measure is no mean over rows.
        flipped: p-value of the sign flips of those.
    """
    first, second = a.scores[column], b.scores[column]
    draws = first.row_draws - second.row_draws  # the same resamples of rows
    difference = first.mean - second.mean
    rows_p = bootstrap_p(draws) if flipped is None else flipped
    rows = _rows_part(lines, draws, first.rows or 0)
    both = [score.seed_part(least) for score in (first, second)]
    several = all(method.base or part is not None for method, part in zip((a, b), both, strict=True))
    tests = [satterthwaite([rows])]
    if several:
        seeds = [part for part in both if part is not None]
        tests = [satterthwaite([rows, *seeds]), satterthwaite(seeds)]
    p, ends = widest_t(difference, tests)
    if flipped is not None or not any(error for error, _ in tests):
        p = max(p, rows_p)
    if p >= SIGNIFICANT:
        ends = min(ends[0], 0.0), max(ends[1], 0.0)
    bounds = first.limits[0] - second.limits[1], first.limits[1] - second.limits[0]
    return Pair(
        first=a.label, second=b.label, task=column[0], measure=column[1], difference=difference,
        interval=_within(bounds, ends), counted=ROWS_AND_SEEDS if several else ROWS_ONLY, p=p, p_holm=p,
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
