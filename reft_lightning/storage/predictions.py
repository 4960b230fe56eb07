"""The predictions of an evaluation, `predictions/*.jsonl` of a run: which row answers what."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Key = tuple[str, str, int]  # task, source, and how often the source occurred before


def keyed(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Key, Mapping[str, Any]]]:
    """Yield each row with what two evaluations of the same data know it by; their orders may differ.

    The order depends on the number of processes, which may be another one after a run was resumed.
    """
    seen: Counter[tuple[str, str]] = Counter()
    for row in rows:
        key = str(row["task"]), str(row["source"])
        yield (*key, seen[key]), row
        seen[key] += 1


def read_predictions(path: Path) -> dict[Key, Mapping[str, Any]]:
    """Return the rows of a file by what they answer, in its order; none without a file."""
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8") as file:  # lines end at \n; texts hold other ends, such as U+2028
        return dict(keyed(_row(line, f"{path}, line {number}") for number, line in enumerate(file, 1)))


def _row(line: str, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
        _ = row["task"], row["source"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where} is not a row of predictions: {error!r}") from error
    return row
