"""Show what an adapter changed: some answers of the frozen base next to those of the adapted model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..storage.predictions import read_predictions
from ..terminal.lines import plain_console

SHOWN = 5  # rows
WIDTH = 60  # characters per cell


def print_changed_answers(folder: Path, method: str, console: Console | None = None) -> None:
    """Print how many test answers became right or wrong, with about five of them spread over the test set.

    Print nothing if the run did not evaluate the frozen base, or if no answer changed between right and wrong.
    """
    files = [folder / "predictions" / f"{who}_test.jsonl" for who in ("base", "reft")]
    base, adapted = (read_predictions(file) for file in files)
    pairs = [(base[key], row) for key, row in adapted.items() if key in base]
    scored = [pair for pair in pairs if all("correct" in row for row in pair)]
    changed = [(before, after) for before, after in scored if before["correct"] != after["correct"]]
    if not changed:
        return
    console = console or plain_console()
    right = sum(row["correct"] for _, row in changed)
    table = Table(
        title=f"answers that changed: {right} of {len(pairs)} became right, {len(changed) - right} became wrong"
    )
    for column in ("end of the question", "right answer", "frozen base", method):
        table.add_column(column)
    for before, after in changed[:: -(-len(changed) // SHOWN)]:
        answers = (_shown(row["answer"]) for row in (before, after))
        table.add_row(_shown(before["prompt"], end=True), _shown(before["gold"]), *answers)
    console.print(table)


def _shown(text: Any, end: bool = False) -> str:
    """Return a text on one line, cut at its end or, with end, at its beginning."""
    line = " ".join(str("(none)" if text is None else text).split())
    if len(line) > WIDTH:
        line = "…" + line[1 - WIDTH :] if end else line[: WIDTH - 1] + "…"
    return escape(line)
