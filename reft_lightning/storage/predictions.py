"""The predictions of an evaluation, in a run's `predictions/*.jsonl`, keyed by task and source."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Key = tuple[str, str, int]  # task, source, and the number of earlier rows with this source


def keyed(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Key, Mapping[str, Any]]]:
    """Yield each row with a key that identifies it across evaluations of the same data, whose orders can differ.

    The order depends on the number of processes, which can change when a run is resumed.
    """
    seen: Counter[tuple[str, str]] = Counter()
    for row in rows:
        key = str(row["task"]), str(row["source"])
        yield (*key, seen[key]), row
        seen[key] += 1


def read_predictions(path: Path) -> dict[Key, Mapping[str, Any]]:
    """Return the rows of a file by key, in its order; empty if there is no file."""
    if not path.is_file():
        return {}
    # only \n ends a line; texts contain other line ends, such as U+2028
    with path.open(encoding="utf-8") as file:
        return dict(keyed(_row(line, f"{path}, line {number}") for number, line in enumerate(file, 1)))


def _row(line: str, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
        _ = row["task"], row["source"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where} is not a prediction: {error!r}") from error
    return row
