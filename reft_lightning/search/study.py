"""The state of a study: one Optuna study a method in ``study.db``, and one run folder a trial.

::

    study.yaml                      the plan, the score that decides, the folder where runs start
    study.db                        Optuna's studies, named as the methods
    trials/METHOD/NUMBER/           a run folder, sealed; command.txt repeats it, cost.json is what it spent
    winners/METHOD/seed_SEED/       a run folder with the test split
    test_reads.jsonl                a line before each read of a test split
    summary.json                    methods, trials, spent budgets, winners, reads

Workers take trials under the lock of the folder. A trial that nobody holds any more is taken again, with its
parameters and from its beginning, so that, of one worker, a study that was killed has the trials of one that was not.
"""

from __future__ import annotations

import json
import logging
import math
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import compose
from ..storage.atomic import now, write_json
from .budget import FREE, MEASURED, cost_in_advance, read_cost, total_cost
from .process import Lock
from .pruning import Reports
from .search_plan import Plan
from .space import Value, draw, quiet_optuna

log = logging.getLogger(__name__)
LEDGER = "test_reads.jsonl"
ERROR_FILE = "error.txt"  # of a winner's run that failed


@dataclass
class Job:
    """A run that a worker has taken: a trial, or a winner's run with one seed."""

    method: str
    number: int  # of the trial, also of the one that won
    params: dict[str, Value]
    folder: Path
    lock: Lock
    overrides: list[str]
    seed: int | None = None  # of a winner's run

    @property
    def name(self) -> str:
        """Return how logs call it."""
        return f"{self.method} {self.number}" + ("" if self.seed is None else f", seed {self.seed}")


class Study:
    """A study in a folder; several processes may share one.

    Args:
        folder: of the study.
        plan: what it does.
        monitor: the validation score that decides.
        maximize: whether a higher one is better.
        environment: variables that its runs are started with, written into their commands.
        since: when the command was started, in seconds of the epoch; None: now. What failed before is tried again.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        monitor: str,
        maximize: bool,
        environment: Mapping[str, str] | None = None,
        since: float | None = None,
    ) -> None:
        self.since = time.time() if since is None else since
        self.folder, self.plan, self.monitor, self.maximize = Path(folder).resolve(), plan, monitor, maximize
        self.environment = dict(environment or {})
        self.lock = Lock(self.folder / "locks" / "study")
        self._costs: dict[tuple[str, ...], float | None] = {}  # by overrides: composing takes a moment
        self._optuna = optuna = quiet_optuna()
        with self.lock:
            storage = optuna.storages.RDBStorage(
                f"sqlite:///{self.folder / 'study.db'}", engine_kwargs={"connect_args": {"timeout": 60}}
            )
            self.studies = {
                method: optuna.create_study(
                    storage=storage, study_name=method, load_if_exists=True,
                    direction="maximize" if maximize else "minimize",
                )
                for method in plan.methods
            }  # fmt: skip

    # --- trials ---------------------------------------------------------------------------------------------

    def take_trial(self) -> Job | None:
        """Return a trial to run, held by this process, or None where there is none to take now.

        First come trials that were running when their process ended; then the next one of the method that has
        spent the least.
        """
        with self.lock:
            for method in self.plan.methods:
                for trial in self.trials(method, "RUNNING"):
                    lock = self._lock(f"{method}.{trial.number}")
                    if lock.acquire(wait=False):
                        return self._job(method, trial.number, trial.params, lock)
            for method in sorted(self.plan.methods, key=lambda m: self.spent(m)[self.plan.unit]):
                job = self._next(method)
                if job is not None:
                    return job
        return None

    def _drawn(self, method: str) -> tuple[int, dict[str, Value], float | None] | None:
        """Return number, parameters and known cost of a method's next trial, or None where it has ended."""
        plan, history = self.plan, self.trials(method)
        committed = self._committed(method)
        if committed >= plan.amount or self.gave_up(method):
            return None
        params = draw(
            plan.methods[method].space, plan.sampler, plan.sampler_seed, method, len(history), history,
            self.maximize, plan.startup_trials,
        )  # fmt: skip
        if params is None:
            return None
        cost = self._cost_in_advance(method, params)
        return None if committed + (cost or 0) > plan.amount else (len(history), params, cost)

    def gave_up(self, method: str) -> bool:
        """Whether a method's last trials since the command's start cost nothing: no budget would ever end it."""
        unit = self.plan.unit
        if unit == "trials":
            return False
        ended = [
            trial for trial in self.trials(method)
            if trial.datetime_complete is not None and trial.datetime_complete.timestamp() >= self.since
        ]  # fmt: skip
        last = ended[-FREE:]
        return len(last) == FREE and not any(read_cost(self._folder(method, t.number))[unit] for t in last)

    def _next(self, method: str) -> Job | None:
        drawn = self._drawn(method)
        if drawn is None:
            return None
        number, params, cost = drawn
        lock = self._lock(f"{method}.{number}")
        lock.acquire()
        # in one transaction: a kill leaves a trial with all its parameters, or none
        self.studies[method].add_trial(
            self._optuna.trial.create_trial(
                state=self._optuna.trial.TrialState.RUNNING, params=params,
                distributions={d.name: d.distribution() for d in self.plan.methods[method].space},
                user_attrs={"cost": cost, "folder": f"trials/{method}/{number}"},
            )
        )  # fmt: skip
        return self._job(method, number, params, lock)

    def _cost_in_advance(self, method: str, params: Mapping[str, Value]) -> float | None:
        if self.plan.unit != "steps":
            return 1 if self.plan.unit == "trials" else None
        overrides = tuple(self.plan.trial_overrides(method, params))
        if overrides not in self._costs:
            try:
                self._costs[overrides] = cost_in_advance(self.plan.unit, compose.compose(overrides))
            except compose.CompositionError:  # the trial will say so, and fail
                self._costs[overrides] = None
        return self._costs[overrides]

    def _committed(self, method: str) -> float:
        """Return what is spent, and for trials that run what they will spend, as far as it is known."""
        spent = self.spent(method)[self.plan.unit]
        if self.plan.unit == "steps":
            for trial in self.trials(method, "RUNNING"):
                so_far = read_cost(self._folder(method, trial.number))["steps"]
                spent += max(0, (trial.user_attrs["cost"] or 0) - so_far)
        return spent

    def _job(self, method: str, number: int, params: Mapping[str, Value], lock: Lock) -> Job:
        params = {name: params[name] for name in (d.name for d in self.plan.methods[method].space)}
        overrides = self.plan.trial_overrides(method, params)
        return Job(method, number, params, self._folder(method, number), lock, overrides)

    def finished_before(self, job: Job) -> bool:
        """Whether a trial that is taken again had ended before, and only its outcome was not yet kept."""
        return self.results(job.folder).get("status") in ("complete", "pruned")

    def prepare(self, job: Job) -> None:
        """Write the folder of a run anew: what it is to do, and the command that repeats it."""
        shutil.rmtree(job.folder, ignore_errors=True)
        job.folder.mkdir(parents=True)
        plan = self.plan
        pruning = dict(plan.pruning) if plan.pruner != "none" else None
        kind = (
            {"kind": "trial", "unit": plan.unit, "amount": plan.amount, "pruning": pruning}
            if job.seed is None
            else {"kind": "winner", "seed": job.seed, "ledger": str(self.folder / LEDGER)}
        )
        write_json(
            job.folder / "job.json",
            {
                **kind,
                "method": job.method,
                "number": job.number,
                "overrides": job.overrides,
                "params": job.params,
            },
        )
        command = [
            *(f"{k}={v}" for k, v in self.environment.items()),
            shlex.join(["reft-train", *job.overrides]),
        ]
        (job.folder / "command.txt").write_text(" ".join(command) + "\n", encoding="utf-8")

    def tell_trial(self, job: Job, ended: str) -> str:
        """Keep the outcome of a trial, and let go of it; return the outcome.

        Args:
            job: the trial.
            ended: how its process failed, with the last lines of its log; empty where it ended well.
        """
        states = self._optuna.trial.TrialState
        results = self.results(job.folder)
        status, value = results.get("status"), results.get("metrics", {}).get(self.monitor)
        attributes: dict[str, Any] = {"config_hash": results.get("config_hash"), "ended": now()}
        if not ended and status == "complete" and value is not None and math.isfinite(value):
            outcome: dict[str, Any] = {"state": states.COMPLETE, "values": value}
        elif not ended and status == "pruned":
            outcome = {"state": states.PRUNED}
            attributes["reason"] = results.get("reason")
        else:
            outcome = {"state": states.FAIL}
            missing = f"the run ended as {status!r}, and {self.monitor} is {value}"
            attributes["error"] = ended or results.get("error") or missing
        with self.lock:
            study = self.studies[job.method]
            frozen = self.trials(job.method)[job.number]
            trial = self._optuna.trial.Trial(study, frozen._trial_id)
            for step, score in Reports.read(job.folder).values.items():
                if step not in frozen.intermediate_values:
                    trial.report(score, step)
            for name, attribute in attributes.items():
                trial.set_user_attr(name, attribute)
            study.tell(job.number, **outcome)
            shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)  # the adapter stays
            job.lock.release()
        return outcome["state"].name.lower()

    # --- winners --------------------------------------------------------------------------------------------

    def winner(self, method: str) -> Any | None:
        """Return Optuna's trial with the best validation score, the first of equals; None where none is complete."""
        sign = -1 if self.maximize else 1
        complete = self.trials(method, "COMPLETE")
        return min(complete, key=lambda trial: (sign * trial.value, trial.number), default=None)

    def take_winner(self) -> Job | None:
        """Return a winner's run that is neither complete nor held nor has failed since the command was started.

        There is none while a trial runs or is still to run: it could win.
        """
        with self.lock:
            if not self.searched():
                return None
            for method, seed, folder in self.winners():
                error = folder / ERROR_FILE
                failed = error.is_file() and error.stat().st_mtime >= self.since
                if failed or self.results(folder).get("status") == "complete":
                    continue
                lock = self._lock(f"winner.{method}.{seed}")
                if lock.acquire(wait=False):
                    trial = self.winner(method)
                    overrides = self.plan.winner_overrides(method, trial.params, seed)
                    return Job(method, trial.number, dict(trial.params), folder, lock, overrides, seed)
        return None

    def tell_winner(self, job: Job, ended: str) -> str:
        """Let go of a winner's run; return its outcome."""
        status = self.results(job.folder).get("status")
        if not ended and status != "complete":
            ended = f"the run ended as {status!r}"
        if ended:
            (job.folder / ERROR_FILE).write_text(ended + "\n", encoding="utf-8")
        job.lock.release()
        return "failed" if ended else "complete"

    def winners(self) -> Iterator[tuple[str, int, Path]]:
        """Yield (method, seed, run folder) for each run of a winner."""
        for method in self.plan.methods:
            if self.winner(method) is not None:
                for seed in self.plan.seeds:
                    yield method, seed, self.folder / "winners" / method / f"seed_{seed}"

    # --- what there is --------------------------------------------------------------------------------------

    def spent(self, method: str) -> dict[str, float]:
        """Return what a method has spent, in every unit."""
        total = total_cost(self.folder / "trials" / method)
        return {"trials": len(self.trials(method)), **{unit: total[unit] for unit in MEASURED}}

    def searched(self) -> bool:
        """Whether no method has a trial that runs or is still to run; the caller holds the study's lock."""
        if any(self.trials(method, "RUNNING") for method in self.plan.methods):
            return False
        return not any(self._drawn(method) for method in self.plan.methods)

    def tested(self) -> bool:
        """Whether every winner's run is complete."""
        return all(self.results(folder).get("status") == "complete" for _, _, folder in self.winners())

    def trials(self, method: str, state: str | None = None) -> list[Any]:
        """Return a method's trials as Optuna keeps them, of one state or of all."""
        states = None if state is None else (self._optuna.trial.TrialState[state],)
        return self.studies[method].get_trials(deepcopy=False, states=states)

    def _folder(self, method: str, number: int) -> Path:
        return self.folder / "trials" / method / str(number)

    def _lock(self, name: str) -> Lock:
        return Lock(self.folder / "locks" / name)

    @staticmethod
    def results(folder: Path) -> dict[str, Any]:
        """Return the contents of a run's ``results.json``; nothing where there is none yet."""
        path = folder / "results.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
