"""A worker of a study: it runs trials while a method has budget left, then the winners.

Several workers can work on one study, also on several machines that share its folder. A worker waits for its turn,
chooses the method that has spent the least, and starts a trial of it with Optuna's ``study.optimize``; when the trial
has drawn its parameters, the next worker has its turn. So no two workers start the last trial, or draw the same
parameters.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..runs.results import read_results
from ..storage.atomic import write_json, write_text
from .budget import counted
from .process import Lock, end_with_parent, failure, start, stop
from .study import LOSS, Study, experimental, run_again, was_tested, winner_status
from .study_files import COMMAND, ERROR, JOB, LOCKS, LOG, TRIALS
from .summary import summarize

log = logging.getLogger(__name__)
TRUSTED = "trusted"  # last argument of a worker's process, and of a run's
WAIT = 0.5  # seconds between two checks for a new trial, while others run the last ones
# Runs the job of a folder while holding a lock; returns how it failed, or an empty string.
Runner = Callable[[Path, Lock], str]


class TrialFailed(RuntimeError):
    """A trial ended without a score."""


class Worker:
    """A worker of a study.

    ``run`` runs the job in a folder, by default in its own process. ``trusted`` says whether the study may name any
    module, like the user's own plan.
    """

    def __init__(self, study: Study, run: Runner | None = None, trusted: bool = True) -> None:
        self.study, self.run, self.trusted = study, run or self._run_in_process, trusted
        self._number = -1  # of its trial
        self._alive = Lock(study.folder / LOCKS / "none")  # held while its run is active

    def work(self) -> None:
        """Run what is left of the study."""
        self.search()
        self.train_winners()

    def search(self) -> None:
        """Run trials until no method has one that is running or can start."""
        while True:
            with self.study.turn:
                for method in self.study.plan.methods:
                    self._retry_lost(method)
                method, running = self.study.next_method()
                if method is not None:
                    self._optimize(method)
            if method is not None:
                trial = self.study.trials(method)[self._number]
                outcome = trial.user_attrs.get("error") or trial.user_attrs.get("reason") or trial.value
                log.info("trial %s %d: %s: %s", method, trial.number, trial.state.name.lower(), outcome)
                summarize(self.study)
            elif running:
                time.sleep(WAIT)
            else:
                return

    def _optimize(self, method: str) -> None:
        study = self.study.studies[method]
        study.sampler, self._number = self._sampler(method), -1
        try:
            study.optimize(partial(self._objective, method), n_trials=1, catch=(TrialFailed,))
        except KeyboardInterrupt:
            if self._number >= 0:
                run_again(study, self.study.trials(method)[self._number])
            raise
        except ValueError:  # Optuna cannot end a trial that has already ended
            if self._number in {trial.number for trial in counted(self.study.trials(method))}:
                raise
            log.warning("trial %s %d was considered lost, as its heartbeat had stopped: another attempt counts instead",
                        method, self._number)  # fmt: skip
        finally:
            self._alive.release()

    def _objective(self, method: str, trial: Any) -> float:
        study, self._number = self.study, trial.number
        self._alive = self._lock(method, trial.number)
        self._alive.acquire()
        params = {d.name: d.suggest(trial) for d in study.plan.space(method)}
        study.turn.release()
        folder = study.folder / TRIALS / method / str(trial.number)
        trial.set_user_attr("folder", str(folder.relative_to(study.folder)))
        overrides = study.plan.trial_overrides(method, params)
        log.info("trial %s %d: %s", method, trial.number, " ".join(overrides[len(study.plan.base) :]))
        values = {"method": method, "number": trial.number, "params": params, "overrides": overrides}
        prepare(folder, {"kind": "trial", **values})
        failed = self.run(folder, self._alive)
        results = read_results(folder)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # the adapter is kept
        status, metrics = results.get("status"), results.get("metrics", {})
        value = metrics.get(study.monitor)
        trial.set_user_attr("config_hash", results.get("config_hash"))
        trial.set_user_attr(LOSS, metrics.get(LOSS))
        if not failed and status == "pruned":
            trial.set_user_attr("reason", results.get("reason"))
            raise study.optuna.TrialPruned
        if failed or status != "complete" or value is None or not math.isfinite(value):
            unscored = "not a number" if study.monitor in metrics else "missing"
            score = unscored if value is None else value
            ending = f"the run ended with status {status!r}, and {study.monitor} is {score}"
            trial.set_user_attr("error", failed or results.get("error") or ending)
            raise TrialFailed
        return value

    def _run_in_process(self, folder: Path, alive: Lock) -> str:
        arguments = ["reft_lightning.search.trial", str(self.study.folder), str(folder)]
        arguments += [TRUSTED] if self.trusted else []
        process = start(arguments, folder / LOG, directory=self.study.directory, lock=alive)
        try:
            code = process.wait()
        finally:
            stop(process)
        return failure(code, folder / LOG)

    def _sampler(self, method: str) -> Any:
        """Return the sampler of one trial, whose draws depend on the plan's seed, the method and earlier trials."""
        samplers, plan = self.study.optuna.samplers, self.study.plan
        if plan.sampler == "grid":
            return samplers.GridSampler(plan.grid(method), seed=_seed(f"{plan.sampler_seed}"))
        seed = _seed(f"{plan.sampler_seed} {method} {len(self.study.trials(method))}")
        if plan.sampler == "random":
            return samplers.RandomSampler(seed=seed)
        return samplers.TPESampler(seed=seed, n_startup_trials=plan.startup_trials)

    def _retry_lost(self, method: str) -> None:
        """Requeue trials whose processes have died; the caller must hold the turn."""
        study, optuna = self.study.studies[method], self.study.optuna
        if isinstance(self.study.storage, optuna.storages.RDBStorage):
            with experimental():
                optuna.storages.fail_stale_trials(study)  # trials without a heartbeat
            return
        for trial in self.study.trials(method):  # a journal has no heartbeat; a running trial holds a lock
            alive = self._lock(method, trial.number)
            if trial.state.name == "RUNNING" and alive.acquire(wait=False):
                if (
                    self.study.trials(method)[trial.number].state.name == "RUNNING"
                ):  # it may have ended meanwhile
                    study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                    run_again(study, trial)
                alive.release()

    def _lock(self, method: str, run: int | str) -> Lock:
        return Lock(self.study.folder / LOCKS / f"{method}.{run}")

    def train_winners(self) -> None:
        """Run the winners that no other worker is running, has finished, or has failed since the command started."""
        for folder, job in self.study.winners():
            alive = self._lock(job["method"], f"seed_{job['seed']}")
            if not alive.acquire(wait=False):
                continue
            with alive:
                if winner_status(folder, job) != "waiting":
                    continue
                if not was_tested(folder, job):
                    prepare(folder, job)
                log.info("winner %s, seed %d: retraining and testing", job["method"], job["seed"])
                failed = self.run(folder, alive)
                status = read_results(folder).get("status")
                if failed or status != "complete":
                    failed = failed or f"the run ended with status {status!r}"
                    write_text(folder / ERROR, failed + "\n")
                log.info("winner %s, seed %d: %s", job["method"], job["seed"], failed or status)
            summarize(self.study)


def prepare(folder: Path, job: Mapping[str, Any]) -> None:
    """Write a new folder for a run, with its job and the command that repeats it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / JOB, job)
    # results depend on the number of threads
    threads = [f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}"] if "OMP_NUM_THREADS" in os.environ else []
    command = " ".join([*threads, shlex.join(["reft-train", *job["overrides"]])])
    write_text(folder / COMMAND, command + "\n")


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def main(folder: Path, trusted: bool) -> None:
    """Run one of several workers: ``python -m reft_lightning.search.worker FOLDER [TRUSTED]``."""
    end_with_parent(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        Worker(Study(folder), trusted=trusted).work()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main(Path(sys.argv[1]), TRUSTED in sys.argv[2:])
