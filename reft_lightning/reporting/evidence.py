"""Intervals of the scores of a comparison, from the predictions of its runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..terminal.bars import Bar
from .comparisons import BASE, LOSS, Comparison, Method, Score
from .pairs import pairs_of
from .runs import LeftOut, Run
from .scores import MAJORITY, Mean, RowMean, limits, measures_of
from .statistics import (
    LEVEL,
    Array,
    Measure,
    generator,
    over_seeds,
    percentile_interval,
    resample_rows,
    satterthwaite,
    seed_weights,
    widest_t,
    within,
)

Key = tuple[str, int]
Rows = Mapping[Key, Mapping[str, Any]]
Gold = Mapping[Key, Any]
Loaded = Sequence[tuple[Method, Run, Rows]]
RESAMPLES = 10_000


def add_evidence(comparison: Comparison, resamples: int = RESAMPLES, seed: int = 0) -> None:
    """Fill in intervals and pairs, for runs that :func:`deviating` accepts.

    The resamples of rows depend only on the seed, the task and the rows, those of seeds also on the method: adding a
    method to the table does not change the other intervals.
    """
    for task in comparison.main:
        loaded = [
            (method, run, run.rows(comparison.split, task, method.base))
            for method in comparison.methods for run in method.runs
        ]  # fmt: skip
        _score_task(comparison, task, loaded, resamples, seed)
    if comparison.has_average:
        _average(comparison)
    comparison.pairs = pairs_of(comparison, resamples, seed)
    flat = [
        method.label for method in comparison.methods
        if (score := method.scores.get(comparison.head)) and score.interval and score.interval[0] == score.interval[1]
    ]  # fmt: skip
    if flat:
        comparison.notes.append(
            f"the interval of {', '.join(flat)} has zero width because all resamples agree; this does not mean the "
            "score is certain"
        )


def deviating(comparison: Comparison) -> list[LeftOut]:
    """Return the runs of a comparison whose predictions cannot be read, or are of rows other than most runs'.

    In a tie, the rows of the run that finished first count.
    """
    found: dict[str, list[tuple[Run, Gold]]] = {}
    left: dict[Run, LeftOut] = {}
    runs = [(run, method.base) for method in comparison.methods for run in method.runs]
    runs.sort(key=lambda pair: (str(pair[0].results.get("finished")), str(pair[0].folder)))
    with Bar("reading predictions", len(runs)) as bar:
        for run, base in runs:
            bar.advance()
            try:
                rows = {task: run.rows(comparison.split, task, base) for task in comparison.main}
            except ValueError as error:
                left.setdefault(run, LeftOut(run.folder, str(error)))
                continue
            for task, own in rows.items():
                if own:
                    gold = {key: row.get("gold") for key, row in own.items()}
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
            left.setdefault(run, LeftOut(run.folder, _deviation(task, *most[0], gold)))
    return list(left.values())


def _deviation(task: str, standard: Run, expected: Gold, gold: Gold) -> str:
    """Say how the rows of a run differ from those that count."""
    alone = sorted(gold.keys() ^ expected.keys())
    if alone:
        return (
            f"its rows of {task} differ from those of {standard.folder}: {len(alone)} are in only one of them, such as "
            f"{alone[0][0]!r}; runs are compared only on the same rows"
        )
    other = next(key for key in gold if gold[key] != expected[key])
    return (
        f"its gold answers of {task} differ from those of {standard.folder}, for {other[0]}: {gold[other]!r} and "
        f"{expected[other]!r}"
    )


def _resampled(comparison: Comparison, task: str, loaded: Loaded) -> dict[Score, dict[int, Measure]]:
    """Return the measures that can be resampled, by score and seed; notes name those that cannot."""
    found: dict[Score, dict[int, Measure]] = defaultdict(dict)
    for method, run, rows in loaded:
        scores = {m: s for (t, m), s in method.scores.items() if t == task}
        reported = {
            m: s.values[run.seed] for m, s in scores.items()
            if run.seed in s.values and run.seed not in s.diverged
        }  # fmt: skip
        measures = measures_of(list(rows.values()), reported, run.task(task)) if rows else {}
        for name in sorted(reported.keys() - {MAJORITY, LOSS} - measures.keys()):
            comparison.notes.append(
                f"{method.label}, seed {run.seed}: the predictions do not reproduce {name} of {task} in results.json, "
                "so there is no interval"
            )
        for name, measure in measures.items():
            found[scores[name]][run.seed] = measure
    return found


def _score_task(comparison: Comparison, task: str, loaded: Loaded, resamples: int, seed: int) -> None:
    measures = _resampled(comparison, task, loaded)
    if not measures:
        return
    rows = next(len(found) for *_, found in loaded if found)
    every = [measure for own in measures.values() for measure in own.values()]
    draws = _draws(every, rows, resamples, generator(seed, "rows", task))
    for method in comparison.methods:
        weights = seed_weights(len(method.runs), resamples, generator(seed, "seeds", _identity(method)))
        for score in method.scores.values():
            own = measures.get(score, {})
            if len(own) == len(method.runs):
                score.rows = rows
                by_seed = np.stack([draws[m] for m in own.values()], 1)
                score.draws, score.row_draws = over_seeds(by_seed, weights), by_seed.mean(1)
                score.limits = limits(next(iter(own.values())))
                means = {s: m.scores for s, m in own.items() if isinstance(m, RowMean)}
                score.row_scores = means if len(means) == len(own) else None
                score.interval = interval_of(score)


def interval_of(score: Score) -> tuple[float, float]:
    """Return the 95 % interval: percentiles for one seed, for several Student's t with the bootstrap's error.

    For few seeds percentiles would be far too narrow, as three seeds estimate their spread badly; and the interval is
    never narrower than Student's over the seeds alone, see :func:`widest_t`. If every row is right, or every row is
    wrong, all resamples agree, and the interval is Wilson's, as printed by ``reft-train``.
    """
    assert score.draws is not None
    assert score.row_draws is not None
    assert score.rows is not None
    seeds = score.seed_part()
    if seeds is None:
        ends = percentile_interval(score.draws)
    else:
        rows = float(score.row_draws.var(ddof=1)), max(score.rows - 1.0, 1.0)
        _, freedom = satterthwaite([rows, seeds])
        both = float(score.draws.std(ddof=1)), freedom
        ends = within(score.limits, widest_t(score.mean, [both, satterthwaite([seeds])])[1])
    by_row = score.row_scores or {}
    if by_row and score.mean in (0.0, 1.0) and all(np.all(s == score.mean) for s in by_row.values()):
        from scipy import stats

        wilson = stats.binomtest(round(score.rows * score.mean), score.rows).proportion_ci(LEVEL, "wilson")
        return float(wilson.low), float(wilson.high)
    return ends


def _draws(
    measures: Sequence[Measure], rows: int, resamples: int, rng: np.random.Generator
) -> dict[Measure, Array]:
    """Return each measure's (B,) resampled values; those of a mean are computed from its parts."""
    single = [measure for measure in measures if not isinstance(measure, Mean)]
    values = resample_rows(single, rows, resamples, rng)
    found = {measure: values[:, k] for k, measure in enumerate(single)}
    for measure in measures:
        if isinstance(measure, Mean):
            found[measure] = np.mean([found[part] for part in measure.parts], axis=0)
    return found


def _identity(method: Method) -> str:
    """Return the identity that seeds a method's resamples of seeds; it is stable across versions of the schema."""
    run = method.runs[0]
    return BASE if method.base else str(run.results.get("config_hash") or run.configuration)


def _average(comparison: Comparison) -> None:
    """Resample the mean over tasks: the rows of each task separately, the seeds jointly for all tasks."""
    column = comparison.columns[-1]
    for method in comparison.methods:
        parts = [method.scores.get(item) for item in comparison.main.items()]
        known: list[Any] = [part for part in parts if part is not None and part.draws is not None]
        if column in method.scores and len(known) == len(parts):
            score = method.scores[column]
            score.rows = sum(part.rows or 0 for part in known)
            score.draws = np.mean([part.draws for part in known], axis=0)
            score.row_draws = np.mean([part.row_draws for part in known], axis=0)
            score.limits = tuple(np.mean([part.limits for part in known], axis=0).tolist())
            score.interval = interval_of(score)
            if score.interval[0] == score.interval[1]:  # all rows of all tasks are right, or wrong
                score.interval = tuple(np.mean([part.interval for part in known], axis=0).tolist())
