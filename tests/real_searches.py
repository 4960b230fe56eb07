"""Searches of short runs, and what they open, for tests."""

import contextlib
import os
import subprocess
import sys

import short_runs

from reft_lightning.search import command, search_plan
from reft_lightning.search.preflight import check_corners, compose_corners
from reft_lightning.search.study import Study
from reft_lightning.search.trial import run_job
from reft_lightning.search.worker import Worker

# Opened files, while a test asks for them: an audit hook sees every way to open a file, and cannot be removed.
WATCHED = []


def _watch(event, arguments):
    if event == "open" and WATCHED and isinstance(arguments[0], str):
        WATCHED[-1].add(arguments[0])


sys.addaudithook(_watch)


@contextlib.contextmanager
def opened():
    """The files that are opened within."""
    WATCHED.append(set())
    try:
        yield WATCHED[-1]
    finally:
        WATCHED.pop()


def contents(data, **changes):
    """A search of short runs, as a file holds it."""
    base = [o for o in short_runs.arguments(data) if not o.startswith(("intervention.rank", "optimizer.lr"))]
    space = {"intervention.rank": {"choice": [1, 2, 4]}, "optimizer.lr": {"log": [1e-4, 1e-1], "points": 3}}
    values = {
        "base": [*base, "checkpoint.monitor=val/loss"],
        "methods": {"loreft": {"overrides": ["intervention=loreft"], "space": space}},
        "budget": {"unit": "trials", "amount": 2}, "sampler": "random", "seeds": [],
    }  # fmt: skip
    return values | changes


def make_study(folder, values, storage=None):
    found = search_plan.parse_plan("test", values)
    monitor, mode = check_corners(found, compose_corners(found))
    command.begin_study(folder, found, monitor, mode, storage)
    return Study(folder)


def work(study):
    """Run what is left of a study in this process."""

    def run(folder, alive):
        try:
            run_job(study.folder, folder)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    study.start()
    Worker(study, run).work()


def start(arguments, folder, **environment):
    """Start the command."""
    code = "import sys; from reft_lightning.cli import search; sys.argv[0] = 'reft-search'; search()"
    argv = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(
        argv,
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
