"""The tables of a report, and its verdict in words.

Scores are multiplied by 100, losses are not.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..terminal.sizes import size
from .comparisons import LOSS, ROWS_AND_SEEDS, SIGNIFICANT, Comparison, Method, Score
from .runs import ALL, LeftOut, Read, repeated
from .studies import Study

# columns of the cost table: heading, and number format
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "percent": ("% of base", "{:.4g}".format),
    "steps": ("steps", "{:,.0f}".format),
    "tokens": ("tokens", "{:,.0f}".format),
    "train_seconds": ("training s", "{:,.1f}".format),
    "tokens_per_second": ("tokens/s", "{:,.0f}".format),
    "peak_memory_bytes": ("peak memory GiB", lambda memory: f"{memory / 2**30:.2f}"),
    "adapter_bytes": ("adapter", size),
}
COSTS = ("trainable_parameters", "head_parameters", *COLUMNS)
EDGE = "†"  # follows the name of a method
EDGED = "at an edge of the search space"


@dataclass(frozen=True)
class Cell:
    """A cell: its text, its sort value, and whether it is the best of its column."""

    text: str
    value: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table with a title; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()


def number(value: float, measure: str) -> str:
    """Return a score as printed in tables: times 100 with one decimal, or a loss with four."""
    if not math.isfinite(value):
        return "diverged"
    return f"{value:.4f}" if measure == LOSS else f"{100 * value:.1f}"


def spread(score: Score) -> str:
    """Return ``mean ± deviation``; only the mean for one seed."""
    text = number(score.mean, score.measure)
    return text if score.deviation is None else f"{text} ± {number(score.deviation, score.measure)}"


def interval(ends: tuple[float, float] | None, measure: str) -> str:
    """Return ``[low, high]``, or an empty string."""
    return "" if ends is None else f"[{number(ends[0], measure)}, {number(ends[1], measure)}]"


def p_value(p: float) -> str:
    """Return a p-value with two significant digits."""
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.01 else f"{p:.3f}"


def score_table(comparison: Comparison) -> Table:
    """Return the table of methods by tasks: mean, deviation over seeds, 95 % interval over rows and seeds."""
    columns = comparison.columns
    rows = []
    for method in comparison.methods:
        name = f"{method.label} {EDGE}" if method.edges else method.label
        cells = [Cell(name), Cell(str(len(method.seeds) or "-"), len(method.seeds))]
        for column in columns:
            score = method.scores.get(column)
            if score is None:
                cells.append(Cell("-"))
                continue
            text = " ".join(filter(None, (spread(score), interval(score.interval, score.measure))))
            # values that print the same are equally good
            same = number(score.mean, column[1]) == number(comparison.best(column), column[1])
            best = same and len(comparison.methods) > 1
            cells.append(_known(text, score.mean, best and not score.diverged))
        rows.append(cells)
    headings = [
        f"{task} {measure.replace('_', ' ')}" if task != ALL else measure for task, measure in columns
    ]
    scores = "Loss" if comparison.head[1] == LOSS else "Scores × 100"
    return Table(
        f"{scores}: mean ± standard deviation over seeds [95 % interval over rows and seeds]",
        ["method", "seeds", *headings], rows, _edge_notes(comparison.methods),
    )  # fmt: skip


def _edge_notes(methods: Sequence[Method]) -> list[str]:
    """Return the note on methods whose settings a search found at an edge of its space."""
    found = "; ".join(f"{method.label} {', '.join(method.edges)}" for method in methods if method.edges)
    if not found:
        return []
    return [f"{EDGE} the best settings of its search are {EDGED}: {found}. Values beyond were not tried."]


def _known(text: str, value: float, best: bool = False) -> Cell:
    """Return a cell that sorts by its value, if that is finite."""
    return Cell(text, value if math.isfinite(value) else None, best)


def cost_table(comparison: Comparison) -> Table:
    """Return the table of what each method trained and spent, as means over seeds."""
    rows = []
    for method in comparison.methods:
        parameters, head = method.cost("trainable_parameters"), method.cost("head_parameters")
        trained = (
            "-" if parameters is None else f"{parameters:,.0f}" + (f" + head {head:,.0f}" if head else "")
        )
        costs = (_cell(method.cost(name), form) for name, (_, form) in COLUMNS.items())
        rows.append([Cell(method.label), Cell(trained, method.trained), *costs])
    columns = ["method", "trained parameters", *(heading for heading, _ in COLUMNS.values())]
    return Table("Cost: means over seeds", columns, rows, comparison.unequal)


def _cell(value: float | None, form: Callable[[float], str]) -> Cell:
    return Cell("-" if value is None else form(value), value)


def measure_table(comparison: Comparison) -> Table:
    """Return the table of every measure of every task, with the value of each seed."""
    rows = []
    names = list(dict.fromkeys(key for method in comparison.methods for key in method.scores))
    for task, measure in names:
        for method in comparison.methods:
            score = method.scores.get((task, measure))
            if score is None:
                continue
            each = ", ".join(
                f"{seed}: {number(value, measure)}" for seed, value in sorted(score.values.items())
            )
            rows.append([
                Cell(task), Cell(measure.replace("_", " ")), Cell(method.label),
                _cell(score.rows, "{:,}".format),
                _known(number(score.mean, measure), score.mean),
                _cell(score.deviation, partial(number, measure=measure)),
                Cell(interval(score.interval, measure) or "-", score.interval[0] if score.interval else None),
                Cell("-" if method.base else each),
            ])  # fmt: skip
    columns = ["task", "measure", "method", "rows", "mean", "deviation", "95 % interval", "by seed"]
    return Table("All measures", columns, rows)


def pair_table(comparison: Comparison, columns: Collection[tuple[str, str]] | None = None) -> Table:
    """Return the table of pairs of methods on the same rows: all of them, or those on some (task, measure)."""
    rows = [
        [
            Cell(f"{pair.first} − {pair.second}"), Cell(pair.task), Cell(pair.measure.replace("_", " ")),
            Cell(f"{'+' if pair.difference > 0 else ''}{number(pair.difference, pair.measure)}", pair.difference),
            _known(interval(pair.interval, pair.measure), pair.interval[0]), Cell(pair.counted),
            Cell(p_value(pair.p), pair.p), Cell(p_value(pair.p_holm), pair.p_holm),
            Cell("yes" if pair.differs else "no"), Cell(pair.rows_test), Cell(p_value(pair.rows_p), pair.rows_p),
            Cell(", ".join(f"{seed}: {p_value(p)}" for seed, p in pair.mcnemar.items()) or "-"),
        ]
        for pair in comparison.pairs if columns is None or (pair.task, pair.measure) in columns
    ]  # fmt: skip
    headings = ["pair", "task", "measure", "difference", "95 % interval, unadjusted", "counted", "p", "p (Holm)",
                "differs by p (Holm)", "rows only: test", "rows only: p", "rows only: McNemar by seed"]  # fmt: skip
    notes = [
        "p counts rows and seeds: Student's t by Welch and Satterthwaite, from the variance of the rows' differences, "
        "averaged over seeds, and the variance of each method's scores over seeds; the latter is at least its mean "
        "over the methods of the table, with at most the degrees of freedom of that mean. p is never below that of the "
        "same test over seeds alone, nor below that of the sign flips. If a method has one seed, only rows are "
        "counted, and nothing is known about other seeds.",
        f"The 95 % interval is for a single pair: it excludes 0 if p < {SIGNIFICANT}. p (Holm) is adjusted over all "
        f"pairs of methods on a task and measure, and methods differ if p (Holm) < {SIGNIFICANT}; so with many pairs "
        "one may not differ although its interval excludes 0. Methods that do not differ are not thereby equal: the "
        "interval shows which differences remain possible.",
        "Rows only: tests over rows, for the trained models; not adjusted. Sign flips: each row's difference, averaged "
        "over seeds, with a random sign; for measures that are not a mean over rows, the paired bootstrap; McNemar's "
        "exact test of right and wrong answers.",
    ]
    return Table("Paired comparison on the same rows", headings, rows, notes if rows else ())


def places(folders: Sequence[Path], roots: Sequence[Path]) -> list[str]:
    """Return short names of folders: relative to the root that contains them, if its name is unique."""
    resolved = list(dict.fromkeys(root.resolve() for root in roots))
    names = Counter(root.name for root in resolved)
    found: list[str] = []
    for folder in folders:
        inside = next((root for root in resolved if folder.resolve().is_relative_to(root)), None)
        if inside is None or names[inside.name] > 1 or not inside.name:
            found.append(str(folder))
        else:
            found.append((Path(inside.name) / folder.resolve().relative_to(inside)).as_posix())
    return found


def read_table(reads: Sequence[Read], roots: Sequence[Path] = ()) -> Table:
    """Return the table of reads of test splits, by time, marking repeated reads by one configuration and seed."""
    named = places([read.folder for read in reads], roots)
    again = repeated(reads)
    rows = [
        [
            Cell(read.time), Cell(read.method), _cell(read.seed, str),
            Cell(read.model), Cell(read.task), Cell(f"{read.rows:,}", read.rows), Cell(read.hash),
            Cell("read again" if i in again else ""), Cell(named[i]),
        ]
        for i, read in enumerate(reads)
    ]  # fmt: skip
    note = (
        f"{len(again)} of {len(reads)} reads repeat one of the same test split by the same configuration and seed: "
        "a choice may have been based on test rows."
    )
    columns = ["time", "method", "seed", "model", "task", "rows", "config hash", "", "run folder"]
    return Table("Reads of test splits", columns, rows, [note] if again else ())


def left_table(left: Sequence[LeftOut]) -> Table:
    """Return the table of folders that were left out."""
    rows = [[Cell(str(item.folder)), Cell(item.reason)] for item in left]
    return Table("Left out", ["folder", "why"], rows)


def monitored(study: Study) -> str:
    """Return the name of the score that a search used, in the scale of the tables."""
    return study.monitor if study.measure == LOSS else f"{study.monitor} × 100"


def study_table(study: Study) -> Table:
    """Return the table of what the search of each method spent and found."""
    units = list(dict.fromkeys(unit for spent in study.spent.values() for unit in spent))
    rows = []
    for method in study.trials:
        best, spent = study.best(method), study.spent.get(method, {})
        found = [Cell("-")] * 3
        if best is not None:
            drawn = best.params.items()
            params = ", ".join(
                f"{name}={v:g}" if isinstance(v, float) else f"{name}={v}" for name, v in drawn
            )
            score = Cell(number(best.value, study.measure), best.value)
            found = [score, Cell(str(best.number), best.number), Cell(params)]
        costs = (_cell(spent.get(unit), "{:,.0f}".format) for unit in units)
        rows.append([Cell(method), Cell(study.states(method)), *found, *costs])
    columns = ["method", "outcomes", f"best {monitored(study)}", "of trial", "with", *units]
    notes = [f"{method}: {remark}" for method, remarks in study.remarks.items() for remark in remarks]
    return Table("Search: what each method spent and found", columns, rows, notes)


def verdict(comparison: Comparison) -> str:
    """Return the result of the head column in a sentence."""
    column = comparison.head
    scored = [method for method in comparison.methods if column in method.scores]
    lost = [method.label for method in scored if method.scores[column].diverged]
    scored = [method for method in scored if method.label not in lost]
    if not scored:
        return f"No method has a finite score: {', '.join(lost)} diverged."
    best, score = scored[0], scored[0].scores[column]
    on = "" if column[0] == ALL else f"on {column[0]}"
    if comparison.has_average:
        on = "on average over the tasks"
    value = " ".join(filter(None, (spread(score), interval(score.interval, score.measure), on)))
    text = f"{best.label} has {value} ({column[1].replace('_', ' ')})"
    equal = [method.label for method in scored[1:] if method.scores[column].mean == score.mean]
    if equal:
        text += f", as have {', '.join(equal)}"
    elif len(scored) > 1:
        text += f", the best of {len(scored)}"
    found: dict[str, list[str]] = defaultdict(list)
    for method in scored[1:]:
        if method.label not in equal:
            found[_judgement(comparison, best, method)].append(method.label)
    parts = [said.format(", ".join(found[said])) for said in JUDGEMENTS if found[said]]
    if lost:
        parts.append(f"{', '.join(lost)} diverged")
    if edged := [method.label for method in comparison.methods if method.edges]:
        parts.append(
            f"the best settings of {', '.join(edged)} are {EDGED} ({EDGE}), so a wider space may contain better ones"
        )
    return "; ".join([text, *parts]) + "."


JUDGEMENTS = (
    f"it differs from {{}} (p < {SIGNIFICANT} after Holm, over rows and seeds)",
    f"on these rows it differs from {{}} (p < {SIGNIFICANT} after Holm, over rows only: nothing is known about other "
    "seeds)",
    "these runs do not distinguish it from {}",
    "it cannot be tested against {}: their predictions do not reproduce both scores",
)


def _judgement(comparison: Comparison, *methods: Method) -> str:
    labels = {method.label for method in methods}
    on_head = (pair for pair in comparison.pairs if (pair.task, pair.measure) == comparison.head)
    pair = next((pair for pair in on_head if {pair.first, pair.second} == labels), None)
    if pair is None:
        return JUDGEMENTS[3]
    if not pair.differs:
        return JUDGEMENTS[2]
    return JUDGEMENTS[0] if pair.counted == ROWS_AND_SEEDS else JUDGEMENTS[1]
