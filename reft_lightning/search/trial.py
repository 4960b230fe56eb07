"""One run of a study, in a process of its own: ``python -m reft_lightning.search.trial FOLDER``.

The folder holds ``job.json``, which says what to run. A trial is an ordinary run whose test split is sealed; it
writes what it spends and what its validations give, and ends where it falls behind or where the budget is used up.
A winner is an ordinary run with the test split; that it is read is written down before it is.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from ..config import compose
from ..runs import experiment
from ..runs.arguments import family_of
from ..runs.checks import Monitor, monitor_of
from ..storage.atomic import now, write_json
from .budget import COST_FILE, flops_per_token, read_cost, total_cost
from .process import end_with_parent
from .pruning import Reports, falls_behind

JOB_FILE = "job.json"
PERIOD = 1.0  # seconds between two looks at what others spend, and two writes of one's own cost


class TrialCallback(Callback):
    """Write what a trial spends and reports; end it where it falls behind or the budget is used up.

    Args:
        folder: of the trial; its siblings are the other trials of the method.
        monitored: the score that decides.
        unit: of the budget.
        amount: of the budget.
        pruning: settings of successive halving, or None not to prune.
    """

    def __init__(
        self,
        folder: Path,
        monitored: Monitor,
        unit: str,
        amount: float,
        pruning: dict[str, int] | None,
    ) -> None:
        self.folder, self.monitored, self.unit, self.amount, self.pruning = (
            folder,
            monitored,
            unit,
            amount,
            pruning,
        )
        self.cost = read_cost(folder)
        self.reports = Reports(folder)
        self._others = 0.0
        self._flops = 0.0
        self._started = self._looked = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()
        self._flops = flops_per_token(pl_module.model, pl_module.model.parameter_roles())
        self._look(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin no batch when the budget is used up."""
        if self.unit == "trials":
            return
        used = self.cost[self.unit] + self._others >= self.amount
        if trainer.strategy.broadcast(used) if trainer.world_size > 1 else used:
            self._write(trainer)
            self._end(f"the method's budget of {self.amount:g} {self.unit} is used up")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count."""
        tokens = pl_module.tokens * trainer.world_size  # the others' batches are about as long
        seconds = time.perf_counter() - self._started
        self.cost = {
            "steps": trainer.global_step, "tokens": tokens, "seconds": seconds, "flops": self._flops * tokens
        }  # fmt: skip
        if time.perf_counter() - self._looked >= PERIOD:
            self._look(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the score; end the trial where it falls behind."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self.cost["seconds"] = time.perf_counter() - self._started
        self.reports.add(float(trainer.callback_metrics[self.monitored.name]))
        behind = False
        if self.pruning is not None and trainer.is_global_zero:
            siblings = (path for path in self.folder.parent.iterdir() if path != self.folder)
            others = {path.name: Reports.read(path) for path in siblings}
            behind = falls_behind(self.reports, others, self.monitored.mode == "max", self.pruning)
        if trainer.is_global_zero:
            self.reports.write()
        self._write(trainer)
        if trainer.strategy.broadcast(behind) if trainer.world_size > 1 else behind:
            self._end(
                f"successive halving: {self.monitored.name} fell behind at validation {len(self.reports.values)}"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the whole cost."""
        self.cost["seconds"] = time.perf_counter() - self._started
        self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what was spent until then."""
        self._write(trainer)

    def _look(self, trainer: Trainer) -> None:
        self._looked = time.perf_counter()
        if self.unit != "trials":
            self._others = total_cost(self.folder.parent, but=self.folder.name)[self.unit]
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / COST_FILE, self.cost)

    def _end(self, reason: str) -> None:
        raise experiment.Halted(
            "pruned",
            reason,
            steps=self.cost["steps"],
            tokens=self.cost["tokens"],
            train_seconds=self.cost["seconds"],
        )


class TestLedger(Callback):
    """Write a line into the study's ledger before each read of the test split.

    Args:
        path: of the ledger.
        folder: of the run, whose ``results.json`` knows the configuration's hash.
        method: of the study.
        seed: of the run.
    """

    def __init__(self, path: Path, folder: Path, method: str, seed: int) -> None:
        self.path, self.folder, self.method, self.seed = path, folder, method, seed

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the line."""
        if not trainer.is_global_zero:
            return
        results = json.loads((self.folder / "results.json").read_text(encoding="utf-8"))
        line = {
            "time": now(), "method": self.method, "seed": self.seed, "config_hash": results["config_hash"],
            "model": "base" if pl_module.prefix else "adapted", "folder": str(self.folder),
        }  # fmt: skip
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def run_job(folder: Path) -> dict[str, Any]:
    """Run what ``job.json`` says; return the contents of ``results.json``.

    Raises:
        ValueError: for a job that cannot run.
    """
    job = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
    config = compose.compose(job["overrides"])
    if config.sealed != (job["kind"] == "trial"):
        raise ValueError(f"{folder}: a trial is sealed and a winner is not; its overrides say otherwise")
    if job["kind"] == "trial":
        monitor = monitor_of(config, family_of(config))
        own: Callback = TrialCallback(folder, monitor, job["unit"], job["amount"], job["pruning"])
    else:
        own = TestLedger(Path(job["ledger"]), folder, job["method"], job["seed"])
    names = [o.partition("=")[2] for o in job["overrides"] if o.startswith("experiment=")]
    return experiment.run(config, folder, names[-1] if names else None, [own])


def main(argv: Sequence[str]) -> None:
    """Run the job of a folder; leave with status 2 where it cannot start."""
    end_with_parent()
    sys.path.insert(0, os.getcwd())  # intervention.method=my_module.RED finds my_module.py here
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        run_job(Path(argv[0]))
    except (compose.CompositionError, experiment.SetupError) as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
