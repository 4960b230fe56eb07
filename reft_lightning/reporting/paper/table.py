"""``reft-report paper``: the numbers in the paper's tables next to the results of runs.

The table gives the mean and the sample standard deviation over seeds; for one seed there is no deviation. A run counts
as the paper's only if its configuration equals the experiment composed with the paper's training file, except for
seeds, file locations and logging. Runs with other settings are separate lines, marked with an asterisk, with the
changed settings.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...terminal.lines import plain_console
from .obtained import Obtained, compare, read_runs
from .published import AVERAGE, Number, Printed, read_rows


def main(options: Mapping[str, str], console: Console | None = None) -> list[tuple[Printed, list[Obtained]]]:
    """Print all tables, or one, next to the runs in a folder; return each row with the groups of its runs.

    Raises:
        ValueError: for an unknown table, or a folder that does not exist.
    """
    rows = read_rows()
    folder, table = Path(options.get("folder", "outputs")).expanduser(), options.get("table")
    if "folder" in options and not folder.is_dir():
        raise ValueError(f"folder={folder}: no such folder; give the folder that runs were written to")
    known = [str(number) for number in dict.fromkeys(row.table for row in rows)]
    if table is not None and table not in known:
        raise ValueError(f"table must be one of {', '.join(known)}, which have experiments; got {table!r}")
    runs = read_runs(folder)
    compared = [(row, compare(row, runs)) for row in rows if table in (None, str(row.table))]
    console = console or plain_console()
    for number in known:
        print_table(number, [pair for pair in compared if str(pair[0].table) == number], console)
    console.print(
        f"{len(runs)} runs in {escape(str(folder))} belong to experiments of the paper.", soft_wrap=True
    )
    return compared


def print_table(number: str, compared: Sequence[tuple[Printed, list[Obtained]]], console: Console) -> None:
    """Print one table: one line per benchmark of each row that was run, and one line for each row that was not."""
    if not compared:
        return
    table = Table(title=f"Table {number}: percent, mean (standard deviation over seeds)")
    for column in ("row", "benchmark", "paper", "obtained", "difference", "seeds"):
        table.add_column(column, justify="left" if column in ("row", "benchmark") else "right")
    notes: list[str] = []
    for row, groups in compared:
        if not groups:
            name = AVERAGE if AVERAGE in row.numbers else next(iter(row.numbers))
            table.add_row(
                _label(row, 1)[0], name, _printed(row.numbers[name]), "not run", "", f"0 of {row.seeds}"
            )
        for group in groups:
            labels = _label(row, len(row.numbers), " *" if group.changed else "")
            for label, (name, printed) in zip(labels, row.numbers.items(), strict=True):
                table.add_row(label, name, *_cells(name, printed, group, row.seeds))
            if group.changed:
                notes.append(f"* {row.experiment} with {', '.join(group.changed)}")
            notes += [f"{row.experiment}: {note}" for note in group.notes]
    console.print(table)
    for note in notes:
        console.print(escape(note), soft_wrap=True)


def _label(row: Printed, lines: int, mark: str = "") -> list[str]:
    """Return the first column for the lines of a row: its name in the paper, and the experiment."""
    name, experiment = escape(row.row) + mark, f"[dim]{row.experiment}[/dim]"
    return [f"{name}\n{experiment}"] if lines == 1 else [name, experiment, *[""] * (lines - 2)]


def _cells(name: str, printed: Number, group: Obtained, of: int) -> tuple[str, str, str, str]:
    values = [scores[name] for scores in group.scores.values() if name in scores]
    seeds = f"{len(values)} of {of}"
    if not values:
        return _printed(printed), "missing", "", seeds
    mean = statistics.fmean(values)
    deviation = statistics.stdev(values) if len(values) > 1 else None
    obtained = _cell(mean, deviation, printed.value) + (" (one seed)" if deviation is None else "")
    decimals = _decimals(printed.value)
    difference = round(mean - printed.value, decimals) + 0.0  # avoids a minus sign before zero
    return _printed(printed), obtained, f"{difference:+.{decimals}f}", seeds


def _printed(number: Number) -> str:
    return _cell(number.value, number.deviation, number.value)


def _cell(value: float, deviation: float | None, like: float) -> str:
    text = f"{value:.{_decimals(like)}f}"
    return text if deviation is None else f"{text} ({deviation:.2f})"


def _decimals(printed: float) -> int:
    return 1 if round(printed, 1) == printed else 2
