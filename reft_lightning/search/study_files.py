"""The files of a study, defined once for the search that writes them and the report that reads them.

::

    study.yaml                      the plan, the score that decides, and where runs start
    study.journal                   Optuna's storage, unless storage=URL is given
    trials/METHOD/NUMBER/           a sealed run folder; job.json says what it is, command.txt repeats it
    winners/METHOD/seed_SEED/       a run folder with the test split; job.json says which trial won
    test_reads.jsonl                one line, written before each read of a test split
    summary.json                    what each method spent, its winner, failures, reads
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..storage.reading import read_json

PLAN = "study.yaml"
JOURNAL = "study.journal"
LEDGER = "test_reads.jsonl"
SUMMARY = "summary.json"
TRIALS, WINNERS, LOCKS, WORKERS = "trials", "winners", "locks", "workers"
# of one run
JOB, COMMAND, LOG, ERROR = "job.json", "command.txt", "log.txt", "error.txt"


def read_job(folder: Path) -> dict[str, Any]:
    """Return the contents of a run folder's ``job.json``; empty for a run that is not part of a study."""
    path = folder / JOB
    return read_json(path) if path.is_file() else {}
