"""The progress of a search: a bar of the budget that its trials have spent, then one of its winners."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..terminal.bars import Bar
from .budget import spent
from .study import Study, winner_status

SECONDS = 2.0  # between two updates


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Show the progress of the study in a folder, whichever process works on it, while the block runs."""
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(folder, ended), daemon=True, name="watched")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _watch(folder: Path, ended: threading.Event) -> None:
    study = Study(folder)  # with its own connection
    methods, unit, amount = study.plan.methods, study.plan.budget.unit, study.plan.budget.amount

    def spent_so_far() -> dict[str, float]:
        return {method: min(_spent(study, method), amount) for method in methods}

    with Bar(f"budget of trials ({unit})", amount * len(methods), sum(spent_so_far().values())) as bar:
        while not ended.wait(SECONDS) and study.next_method() != (None, False):
            done = spent_so_far()
            bar.show(sum(done.values()), ", ".join(f"{method} {value:g}" for method, value in done.items()))
    winners = list(study.winners())
    with Bar("winners, retrained and tested", len(winners)) as bar:
        while not ended.wait(SECONDS):
            bar.show(sum(winner_status(run, job) in ("complete", "failed") for run, job in winners))


def _spent(study: Study, method: str) -> float:
    """Return what a method has spent; if the unit is trials, the number of trials that have ended."""
    unit, trials = study.plan.budget.unit, study.trials(method)
    running = sum(trial.state.name == "RUNNING" for trial in trials) if unit == "trials" else 0
    return spent(trials)[unit] - running
