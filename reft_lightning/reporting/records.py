"""The records of CSV files and W&B tables, with scores as fractions."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from ..storage.atomic import json_text, write_text
from .comparisons import Comparison
from .tables import COSTS

CSV_COLUMNS = (
    "comparison", "split", "model", "task", "measure", "main", "method", "seeds", "rows", "mean", "deviation", "low",
    "high", "by_seed", *COSTS, "unequal_budget", "folders",
)  # fmt: skip
PAIR_COLUMNS = (
    "comparison", "task", "measure", "first", "second", "difference", "low", "high", "counted", "p", "p_holm",
    "differs", "rows_test", "rows_p", "mcnemar",
)  # fmt: skip


def records(comparisons: Sequence[Comparison]) -> list[dict[str, object]]:
    """Return one record per method, task and measure; scores are fractions."""
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
    """Return one record per pair of methods."""
    return [
        {
            **vars(pair), "comparison": comparison.title, "low": pair.interval[0], "high": pair.interval[1],
            "differs": pair.differs, "mcnemar": json_text(pair.mcnemar),
        }
        for comparison in comparisons for pair in comparison.pairs
    ]  # fmt: skip


def write_csv(path: Path, lines: Sequence[dict[str, object]], columns: Sequence[str]) -> None:
    """Write records as CSV; a missing value is empty, NaN is written as nan."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, text.getvalue())
