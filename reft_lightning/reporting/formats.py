"""Tables as LaTeX, and the records of CSV files: LaTeX shows scores times 100, the CSV files hold fractions."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from ..storage.atomic import json_text, write_text
from .comparisons import Comparison
from .tables import COSTS, Cell, Table, cost_table, pair_table, score_table, verdict


def latex(comparison: Comparison) -> str:
    """Return scores, costs and pairs on the head column as tables for booktabs, each with its notes below."""
    score, cost = score_table(comparison), cost_table(comparison)
    said = [verdict(comparison), *comparison.unequal, *comparison.notes]
    parts = [
        latex_table(score, f"{comparison.title}. {score.title}.", [*score.notes, *said]),
        latex_table(cost, f"{comparison.title}. {cost.title}."),
    ]
    if comparison.pairs:
        pairs = pair_table(comparison, [comparison.head])
        parts.append(latex_table(pairs, f"{comparison.title}. {pairs.title}."))
    return "\n".join([r"% \usepackage{booktabs}", *parts])


def latex_table(table: Table, caption: str, notes: Sequence[str] | None = None) -> str:
    """Return a table for booktabs; the best cells are bold, and notes stand below.

    Args:
        table: any.
        caption: of the float.
        notes: None for the table's own.
    """
    import pandas as pd

    frame = pd.DataFrame(
        [map(_tex_cell, row) for row in table.rows], columns=[_tex(name) for name in table.columns]
    )
    text = frame.style.hide(axis="index").to_latex(
        hrules=True, position_float="centering", caption=_tex(caption),
        column_format="l" + "r" * (len(table.columns) - 1),
    )  # fmt: skip
    below = [rf"\par {_tex(note)}" for note in (table.notes if notes is None else notes)]
    if below:
        lines = [
            r"\par\medskip",
            r"\begin{minipage}{\linewidth}",
            r"\footnotesize",
            *below,
            r"\end{minipage}",
            "",
        ]
        text = text.replace(r"\end{table}", "\n".join(lines) + r"\end{table}")
    return text


def _tex_cell(cell: Cell) -> str:
    text = _tex(cell.text)
    if cell.value is not None:
        text = re.sub(r"(?<!\w)-(?=\d)", "$-$", text)
    return rf"\textbf{{{text}}}" if cell.best else text


def _tex(text: str) -> str:
    names = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
             "−": "$-$", "†": r"$\dagger$", "×": r"$\times$", "<": r"\textless{}", ">": r"\textgreater{}"}  # fmt: skip
    return "".join(names.get(c, f"\\{c}" if c in "&%$#_{}" else " " if c == "\n" else c) for c in text)


CSV_COLUMNS = (
    "comparison", "split", "model", "task", "measure", "main", "method", "seeds", "rows", "mean", "deviation", "low",
    "high", "by_seed", *COSTS, "unequal_budget", "folders",
)  # fmt: skip
PAIR_COLUMNS = (
    "comparison", "task", "measure", "first", "second", "difference", "low", "high", "counted", "p", "p_holm",
    "differs", "rows_test", "rows_p", "mcnemar",
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
                    "deviation": score.deviation, "low": low, "high": high, "by_seed": json_text(score.values),
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
            "counted": pair.counted, "p": pair.p, "p_holm": pair.p_holm, "differs": pair.differs,
            "rows_test": pair.rows_test, "rows_p": pair.rows_p, "mcnemar": json_text(dict(pair.mcnemar)),
        }
        for comparison in comparisons for pair in comparison.pairs
    ]  # fmt: skip


def write_csv(path: Path, lines: Sequence[dict[str, object]], columns: Sequence[str]) -> None:
    """Write records as CSV, a missing value as nothing, one that is not a number as nan."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, text.getvalue())
