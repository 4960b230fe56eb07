"""One run of a study, in its own process: ``python -m reft_lightning.search.trial STUDY FOLDER [TRUSTED]``.

``job.json`` in the run's folder says what to run. A trial is an ordinary run whose test split is sealed; it reports its
validations to Optuna, and ends if it is pruned or would exceed the budget. A winner is an ordinary run with the test
split; each read of that split is recorded before it happens.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer

from ..config import compose
from ..runs import experiment
from ..runs.results import read_results
from ..runs.wandb_names import filed, label
from ..storage.atomic import now
from ..suggest import names_of_a_stranger, trusted
from .budget import spent
from .process import end_with_parent
from .space import brief
from .study import Study, was_tested
from .study_files import LEDGER, read_job

PERIOD = 2.0  # seconds between two updates of a trial's own cost and of the other trials' costs


class TrialCallback(Callback):
    """Report a trial's validations and costs to Optuna; end it if it is pruned or would exceed the budget."""

    def __init__(self, study: Study, method: str, number: int) -> None:
        self.study, self.method, self.number = study, method, number
        self.unit, self.amount, self.monitor = study.plan.budget.unit, study.plan.budget.amount, study.monitor
        trial_id = study.trials(method)[number]._trial_id
        self.trial = study.optuna.trial.Trial(study.studies[method], trial_id)
        self.cost = {"steps": 0, "tokens": 0, "seconds": 0.0}
        self._others = 0.0
        self._started = self._noted = time.perf_counter()
        self._validations = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()
        self._note(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """End the trial before a batch if the budget is used up."""
        if self.unit == "trials":
            return
        if time.perf_counter() - self._noted >= PERIOD:
            self._note(trainer)
        if _agreed(trainer, self.cost[self.unit] + self._others >= self.amount):
            self._end(trainer, f"the method's budget of {self.amount:g} {self.unit} is used up")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the costs."""
        # batches of other ranks have about as many tokens
        tokens = cast(Any, pl_module).tokens * trainer.world_size
        seconds = time.perf_counter() - self._started
        self.cost = {"steps": trainer.global_step, "tokens": tokens, "seconds": seconds}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the score, unless it is NaN; end the trial if the pruner decides so."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._validations += 1
        self._note(trainer)
        score = float(trainer.callback_metrics[self.monitor])
        prune = False
        if trainer.is_global_zero and math.isfinite(score):
            self.trial.report(score, self._validations)
            prune = self.trial.should_prune()
        if _agreed(trainer, prune):
            number, pruner = self._validations, self.study.plan.pruner
            self._end(trainer, f"{pruner}: {self.monitor} fell behind at validation {number}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the total cost."""
        self._note(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Record the cost so far."""
        self._note(trainer)

    def _note(self, trainer: Trainer) -> None:
        """Write this trial's cost, and read that of the others."""
        self._noted = time.perf_counter()
        self.cost["seconds"] = self._noted - self._started
        if trainer.is_global_zero:
            self.trial.set_user_attr("cost", self.cost)
            others = [trial for trial in self.study.trials(self.method) if trial.number != self.number]
            self._others = spent(others)[self.unit]

    def _end(self, trainer: Trainer, reason: str) -> None:
        self._note(trainer)
        steps, tokens, seconds = self.cost["steps"], self.cost["tokens"], self.cost["seconds"]
        raise experiment.Halted("pruned", reason, steps=steps, tokens=tokens, train_seconds=seconds)


def _agreed(trainer: Trainer, decision: bool) -> bool:
    """Return the decision of rank 0."""
    return trainer.strategy.broadcast(decision) if trainer.world_size > 1 else decision


class TestLedger(Callback):
    """Append a line to the study's ledger before each read of the test split by the run in a folder."""

    def __init__(self, path: Path, folder: Path, method: str, seed: int) -> None:
        self.path, self.folder, self.method, self.seed = path, folder, method, seed

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Append the line."""
        if not trainer.is_global_zero:
            return
        line = {
            "time": now(), "method": self.method, "seed": self.seed,
            "config_hash": read_results(self.folder)["config_hash"],
            "model": "base" if pl_module.prefix else "adapted", "folder": str(self.folder),
        }  # fmt: skip
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def run_job(study: Path, folder: Path) -> dict[str, Any]:
    """Run the job described in a folder's ``job.json``; return the contents of ``results.json``."""
    job = read_job(folder)
    config = compose.compose(job["overrides"])
    if config.sealed != (job["kind"] == "trial"):
        raise ValueError(f"{folder}: a trial must be sealed and a winner must not be; its overrides differ")
    params = brief(job["params"]) if job["kind"] == "trial" else []
    config = filed(
        config, group=study.resolve().name, job_type=job["kind"], name=label(config, params, job["method"])
    )
    # the folder is the study's: restart what a lost worker left there; an untrusted study cannot set trust_code
    config = replace(config, overwrite=True, trust_code=config.trust_code and trusted())
    if job["kind"] == "trial":
        own: Callback = TrialCallback(Study(study), job["method"], job["number"])
    else:
        own = TestLedger(study / LEDGER, folder, job["method"], job["seed"])
        if was_tested(folder, job):
            config = replace(config, resume=str(folder))
    names = [o.partition("=")[2] for o in job["overrides"] if o.startswith("experiment=")]
    return experiment.run(config, folder, names[-1] if names else None, [own])


def main(argv: Sequence[str]) -> None:
    """Run the job of a folder, in a study that is trusted or not; exit with status 2 if it cannot start."""
    end_with_parent()
    study, folder, *trust = argv
    if trust:
        sys.path.insert(0, os.getcwd())  # intervention.method=my_module.RED finds my_module.py here
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        with names_of_a_stranger(bool(trust)):
            run_job(Path(study), Path(folder))
    except (compose.CompositionError, experiment.SetupError) as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
