"""The reads of test splits by a study: a line in its ledger before each, and the records in its winners' results.

Results are removed when a winner restarts, so only the ledger has the reads before that; reads by ``reft-eval`` are
only in the results.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..runs.results import read_results
from .study_files import LEDGER, WINNERS

log = logging.getLogger(__name__)


def test_reads(folder: Path) -> list[dict[str, Any]]:
    """Return every read of a test split, by time; ``again`` marks those after the first of a method, seed and model."""
    recorded = list(_recorded(folder))
    found = [*_lost(folder, recorded), *(read for read, _ in recorded)]
    found.sort(key=lambda read: str(read.get("time", "")))
    seen: set[tuple[Any, ...]] = set()
    for read in found:
        if _who(read) in seen:
            read["again"] = True
        seen.add(_who(read))
    return found


def lost_reads(folder: Path) -> list[dict[str, Any]]:
    """Return the ledger lines of reads that no results record any more: the first of their method, seed and model."""
    return _lost(folder, _recorded(folder))


def _lost(folder: Path, recorded: Iterable[tuple[dict[str, Any], bool]]) -> list[dict[str, Any]]:
    kept = Counter(_who(read) for read, searched in recorded if searched)
    lines = list(_lines(folder / LEDGER))
    lost = Counter(map(_who, lines)) - kept
    found: list[dict[str, Any]] = []
    for line in lines:
        if lost[_who(line)] > 0:
            lost[_who(line)] -= 1
            found.append(line)
    return found


def winner_folder(folder: Path, read: Mapping[str, Any]) -> Path:
    """Return the folder of the winner that made a read, also if the study was moved."""
    return folder / WINNERS / str(read["method"]) / f"seed_{read['seed']}"


def _who(read: Mapping[str, Any]) -> tuple[str, str, str]:
    return str(read["method"]), str(read["seed"]), str(read["model"])


def _recorded(folder: Path) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yield the reads in the winners' results, one for all test sets together, and whether the search made it."""
    for run in sorted(path.parent for path in folder.glob(f"{WINNERS}/*/seed_*/results.json")):
        try:
            values = read_results(run)
        except ValueError:  # damaged: the ledger still has the search's reads
            continue
        seed = run.name.removeprefix("seed_")
        events = {
            (str(read.get("model")), str(read.get("time"))): read for read in values.get("test_reads") or ()
        }
        for (model, time), read in events.items():
            yield {
                "time": time, "method": run.parent.name, "seed": int(seed) if seed.isdecimal() else seed,
                "config_hash": read.get("config_hash"), "model": model, "folder": str(run),
            }, time <= str(values.get("finished") or "~")  # fmt: skip


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:  # only \n ends a line
        for line in file:
            try:
                read = json.loads(line)
                _who(read)
            except (ValueError, TypeError, KeyError):
                log.warning("%s: cannot read the line: %.80s", path, line)
            else:
                yield read
