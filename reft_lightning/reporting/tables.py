"""The tables of a report, as Markdown, LaTeX and CSV.

Scores are percent, losses are what they are; the CSV file holds fractions, for programs.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .comparisons import LOSS, SIGNIFICANT, Comparison, Method, Pair, Score
from .runs import LeftOut, Read, repeated
from .studies import Study

COSTS = (
    "trainable_parameters", "head_parameters", "percent", "steps", "tokens", "train_seconds", "tokens_per_second",
    "peak_memory_bytes", "adapter_bytes",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A cell: what is read, what it sorts by, and whether it is the best of its column."""

    text: str
    value: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A titled table; the first column names the line."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = field(default_factory=tuple)


def number(value: float, measure: str) -> str:
    """Return a score as tables print it: percent with one decimal, a loss with four."""
    return f"{value:.4f}" if measure == LOSS else f"{100 * value:.1f}"


def spread(score: Score) -> str:
    """Return `mean ± deviation`; the mean alone of one seed."""
    text = number(score.mean, score.measure)
    return text if score.deviation is None else f"{text} ± {number(score.deviation, score.measure)}"


def interval(ends: tuple[float, float] | None, measure: str) -> str:
    """Return `[low, high]`, or nothing."""
    return "" if ends is None else f"[{number(ends[0], measure)}, {number(ends[1], measure)}]"


def p_value(p: float) -> str:
    """Return a p-value with two digits that count."""
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.01 else f"{p:.3f}"


def size(count: float) -> str:
    """Return bytes in a unit that fits."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def score_table(comparison: Comparison) -> Table:
    """Return methods against tasks: mean, deviation over seeds, 95 % interval over rows and seeds."""
    columns = comparison.columns
    rows = []
    for method in comparison.methods:
        cells = [Cell(method.label), Cell(str(len(method.seeds) or "-"), len(method.seeds))]
        for column in columns:
            score = method.scores.get(column)
            if score is None:
                cells.append(Cell("-"))
                continue
            text = " ".join(filter(None, (spread(score), interval(score.interval, score.measure))))
            # what prints the same is as good
            same = number(score.mean, column[1]) == number(comparison.best(column), column[1])
            best = same and len(comparison.methods) > 1
            cells.append(Cell(text, score.mean, best))
        rows.append(cells)
    headings = [
        f"{task} {measure.replace('_', ' ')}" if task != "all" else measure for task, measure in columns
    ]
    units = "the loss" if comparison.head[1] == LOSS else "percent"
    return Table(
        f"Scores: {units}, mean ± standard deviation over seeds [95 % interval over rows and seeds]",
        ["method", "seeds", *headings], rows,
    )  # fmt: skip


def cost_table(comparison: Comparison) -> Table:
    """Return what each method trained and spent, means over seeds."""
    rows = []
    for method in comparison.methods:
        values = {name: method.cost(name) for name in COSTS}
        parameters, head = values["trainable_parameters"], values["head_parameters"]
        trained = (
            "-" if parameters is None else f"{parameters:,.0f}" + (f" + head {head:,.0f}" if head else "")
        )
        memory, saved = values["peak_memory_bytes"], values["adapter_bytes"]
        rows.append([
            Cell(method.label), Cell(trained, parameters),
            _cell(values["percent"], "{:.4g}"), _cell(values["steps"], "{:,.0f}"), _cell(values["tokens"], "{:,.0f}"),
            _cell(values["train_seconds"], "{:,.1f}"), _cell(values["tokens_per_second"], "{:,.0f}"),
            Cell("-" if memory is None else f"{memory / 2**30:.2f}", memory),
            Cell("-" if saved is None else size(saved), saved),
        ])  # fmt: skip
    columns = ["method", "trained parameters", "% of base", "steps", "tokens", "training s", "tokens/s",
               "peak memory GiB", "adapter"]  # fmt: skip
    return Table("Cost: means over seeds", columns, rows, comparison.unequal)


def _cell(value: float | None, form: str) -> Cell:
    return Cell("-" if value is None else form.format(value), value)


def measure_table(comparison: Comparison) -> Table:
    """Return every measure of every task, with the value of each seed."""
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
                Cell("-" if score.rows is None else f"{score.rows:,}", score.rows),
                Cell(number(score.mean, measure), score.mean),
                Cell("-" if score.deviation is None else number(score.deviation, measure), score.deviation),
                Cell(interval(score.interval, measure) or "-", score.interval[0] if score.interval else None),
                Cell("-" if method.base else each),
            ])  # fmt: skip
    columns = ["task", "measure", "method", "rows", "mean", "deviation", "95 % interval", "by seed"]
    return Table("All measures", columns, rows)


def pair_table(comparison: Comparison, columns: Collection[tuple[str, str]] | None = None) -> Table:
    """Return pairs of methods on the same rows: all of them, or those on some (task, measure)."""
    rows = [
        [
            Cell(f"{pair.first} − {pair.second}"), Cell(pair.task), Cell(pair.measure.replace("_", " ")),
            Cell(f"{'+' if pair.difference > 0 else ''}{number(pair.difference, pair.measure)}", pair.difference),
            Cell(interval(pair.interval, pair.measure), pair.interval[0]), Cell(pair.test),
            Cell(p_value(pair.p), pair.p), Cell(p_value(pair.p_holm), pair.p_holm),
            Cell("yes" if pair.differs else "no"),
            Cell(", ".join(f"{seed}: {p_value(p)}" for seed, p in pair.mcnemar.items()) or "-"),
        ]
        for pair in comparison.pairs if columns is None or (pair.task, pair.measure) in columns
    ]  # fmt: skip
    headings = ["pair", "task", "measure", "difference", "95 % interval", "test", "p", "p (Holm)", "differs",
               "McNemar by seed"]  # fmt: skip
    notes = [
        "Sign flips: each row's difference of scores, averaged over seeds, with its sign drawn at random; the test is "
        "about rows, given the models that were trained. Measures that are no mean over rows: paired bootstrap. The "
        f"interval counts seeds too. Methods differ where p (Holm) < {SIGNIFICANT} and the interval leaves out 0.",
        "p (Holm) is adjusted over all pairs of methods on a task and measure; McNemar's exact test is not adjusted.",
    ]
    return Table("Paired comparison on the same rows", headings, rows, notes if rows else ())


def read_table(reads: Sequence[Read]) -> Table:
    """Return every read of a test split, marked where one configuration and seed read it again."""
    again = repeated(reads)
    rows = [
        [
            Cell(read.time), Cell(read.method), Cell("-" if read.seed is None else str(read.seed), read.seed),
            Cell(read.model), Cell(read.task), Cell(f"{read.rows:,}", read.rows), Cell(read.hash),
            Cell("read again" if i in again else ""), Cell(str(read.folder)),
        ]
        for i, read in enumerate(reads)
    ]  # fmt: skip
    note = (
        f"{len(again)} of {len(reads)} reads repeat one of the same test split by the same configuration and seed: "
        "a choice may have been made by test rows."
    )
    columns = ["time", "method", "seed", "model", "task", "rows", "config hash", "", "run folder"]
    return Table("Reads of test splits", columns, rows, [note] if again else ())


def left_table(left: Sequence[LeftOut]) -> Table:
    """Return the folders that were left out."""
    rows = [[Cell(str(item.folder)), Cell(item.reason)] for item in left]
    return Table("Left out", ["folder", "why"], rows)


def study_table(study: Study) -> Table:
    """Return what the search of each method spent and found."""
    units = list(dict.fromkeys(unit for spent in study.spent.values() for unit in spent))
    rows = []
    for method in study.trials:
        best = study.best(method)
        drawn = best.params.items() if best else ()
        params = ", ".join(f"{name}={v:g}" if isinstance(v, float) else f"{name}={v}" for name, v in drawn)
        spent = study.spent.get(method, {})
        rows.append([
            Cell(method), Cell(study.states(method)),
            Cell("-" if best is None or best.value is None else f"{best.value:.4f}", best.value if best else None),
            Cell("-" if best is None else str(best.number), best.number if best else None), Cell(params or "-"),
            *(_cell(spent.get(unit), "{:,.4g}" if unit == "flops" else "{:,.0f}") for unit in units),
        ])  # fmt: skip
    columns = ["method", "outcomes", f"best {study.monitor}", "of trial", "with", *units]
    return Table("Search: what each method spent and found", columns, rows)


def verdict(comparison: Comparison) -> str:
    """Return what the head column says, in a sentence."""
    column = comparison.head
    scored = [method for method in comparison.methods if column in method.scores]
    best, score = scored[0], scored[0].scores[column]
    on = (
        "on average over the tasks"
        if comparison.has_average
        else ""
        if column[0] == "all"
        else f"on {column[0]}"
    )
    value = " ".join(filter(None, (spread(score), interval(score.interval, score.measure), on)))
    text = f"{best.label} has {value} ({column[1].replace('_', ' ')})"
    if len(scored) == 1:
        return f"{text}."
    equal = [method.label for method in scored[1:] if method.scores[column].mean == score.mean]
    parts = [f"{text}, as have {', '.join(equal)}" if equal else f"{text}, the best of {len(scored)}"]
    sure, unsure = [], []
    for method in scored[1:]:
        pair = _pair(comparison, best, method)
        if pair is not None and method.label not in equal:
            (sure if pair.differs else unsure).append(method.label)
    if sure:
        parts.append(f"it differs from {', '.join(sure)} (p < {SIGNIFICANT} after Holm, interval without 0)")
    if unsure:
        parts.append(f"it cannot be told from {', '.join(unsure)}")
    return "; ".join(parts) + "."


def _pair(comparison: Comparison, a: Method, b: Method) -> Pair | None:
    labels = {a.label, b.label}
    return next(
        (
            p
            for p in comparison.pairs
            if {p.first, p.second} == labels and (p.task, p.measure) == comparison.head
        ),
        None,
    )


# --- formats ------------------------------------------------------------------------------------------------


def markdown(table: Table) -> str:
    """Return a table in GitHub's Markdown; the best cells are bold."""
    lines = [
        f"**{_md(table.title)}**",
        "",
        _line(map(_md, table.columns)),
        _line("---" for _ in table.columns),
    ]
    for row in table.rows:
        lines.append(_line(f"**{_md(cell.text)}**" if cell.best else _md(cell.text) for cell in row))
    return "\n".join([*lines, *(f"\n{_md(note)}" for note in table.notes)]) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _md(text: str) -> str:
    for character in "\\|*`<":
        text = text.replace(character, f"\\{character}")
    return text.replace("](", "]\\(").replace("\n", " ")


def latex(comparison: Comparison) -> str:
    """Return the score table with parameters for booktabs; the best values are bold."""
    table = score_table(comparison)
    rows = []
    for method, cells in zip(comparison.methods, table.rows, strict=True):
        percent = method.cost("percent")
        scores = []
        for cell, column in zip(cells[2:], comparison.columns, strict=True):
            score = method.scores.get(column)
            scores.append("--" if score is None else _tex_score(score, cell.best))
        parameters = "--" if percent is None else f"{percent:.3g}"
        rows.append(" & ".join([_tex(method.label), parameters, *scores]) + r" \\")
    headings = ["Method", r"Params (\%)", *(_tex(name) for name in table.columns[2:])]
    caption = f"{comparison.title}. {table.title}."
    if comparison.unequal:
        caption += f" {'; '.join(comparison.unequal).capitalize()}."
    return "\n".join([
        r"% \usepackage{booktabs}", r"\begin{table}", r"\centering",
        rf"\caption{{{_tex(caption)}}}", rf"\begin{{tabular}}{{lr{'r' * len(comparison.columns)}}}", r"\toprule",
        " & ".join(headings) + r" \\", r"\midrule", *rows, r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
    ])  # fmt: skip


def _tex_score(score: Score, best: bool) -> str:
    mean = number(score.mean, score.measure).replace("-", "$-$")
    text = rf"\textbf{{{mean}}}" if best else mean
    if score.deviation is not None:
        text += rf"$_{{\pm {number(score.deviation, score.measure)}}}$"
    if score.interval is not None:
        text += rf" {{\scriptsize [{', '.join(number(x, score.measure).replace('-', '$-$') for x in score.interval)}]}}"
    return text


def _tex(text: str) -> str:
    names = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
             "−": "$-$", "<": r"\textless{}", ">": r"\textgreater{}"}  # fmt: skip
    return "".join(names.get(c, f"\\{c}" if c in "&%$#_{}" else " " if c == "\n" else c) for c in text)


CSV_COLUMNS = (
    "comparison", "split", "model", "task", "measure", "main", "method", "seeds", "rows", "mean", "deviation", "low",
    "high", "by_seed", *COSTS, "unequal_budget", "folders",
)  # fmt: skip
PAIR_COLUMNS = (
    "comparison", "task", "measure", "first", "second", "difference", "low", "high", "test", "p", "p_holm", "differs",
    "mcnemar",
)  # fmt: skip


def records(comparisons: Sequence[Comparison]) -> list[dict[str, object]]:
    """Return one record for each method, task and measure; scores are fractions."""
    found: list[dict[str, object]] = []
    for comparison in comparisons:
        for method in comparison.methods:
            for (task, measure), score in method.scores.items():
                low, high = score.interval or (None, None)
                found.append({
                    "comparison": comparison.title, "split": comparison.split, "model": comparison.facts["model"],
                    "task": task, "measure": measure, "main": (task, measure) in comparison.columns,
                    "method": method.label, "seeds": len(method.seeds), "rows": score.rows, "mean": score.mean,
                    "deviation": score.deviation, "low": low, "high": high, "by_seed": json.dumps(score.values),
                    **{name: method.cost(name) for name in COSTS}, "unequal_budget": "; ".join(comparison.unequal),
                    "folders": "; ".join(str(run.folder) for run in method.runs),
                })  # fmt: skip
    return found


def pair_records(comparisons: Sequence[Comparison]) -> list[dict[str, object]]:
    """Return one record for each pair of methods."""
    return [
        {
            "comparison": comparison.title, "task": pair.task, "measure": pair.measure, "first": pair.first,
            "second": pair.second, "difference": pair.difference, "low": pair.interval[0], "high": pair.interval[1],
            "test": pair.test, "p": pair.p, "p_holm": pair.p_holm, "differs": pair.differs,
            "mcnemar": json.dumps(dict(pair.mcnemar)),
        }
        for comparison in comparisons for pair in comparison.pairs
    ]  # fmt: skip


def write_csv(path: Path, lines: Sequence[dict[str, object]], columns: Sequence[str]) -> None:
    """Write records as CSV, a missing value as nothing."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    path.write_text(text.getvalue(), encoding="utf-8")
