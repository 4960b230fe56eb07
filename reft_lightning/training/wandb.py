"""W&B reports: curves in sections, predictions next to those of the base, alerts, results, and the adapter.

The prefix of a name is its section: ``train/``, ``val/``, ``test/``, ``base/`` (the frozen base), ``progress/``
(tokens, seconds, memory, learning rates) and ``edit/``, which is reserved for callbacks that measure interventions.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, WandbLogger

from ..storage.predictions import Key, keyed, read_predictions
from .best_checkpoint import LOSS, BestCheckpoint

log = logging.getLogger(__name__)

STEP = "trainer/global_step"  # Lightning's name for the x-axis of every curve
TABLE_ROWS = {"val": 100, "test": 1000}  # predictions per table; validations are logged every time
COMPARED = ("generated", "answer", "option", "correct")  # columns shown for both the adapter and the base
# entries of results.json that are copied to the metadata of an adapter's artifact
LINEAGE = (
    "method", "model", "model_commit", "model_fingerprint", "seed", "config_hash", "git_commit",
    "trainable_parameters", "best_step", "data_versions",
)  # fmt: skip
WINDOW = 10  # number of logged losses to average
DIVERGED = 1.5  # alert if the loss exceeds this multiple of the initial loss

Row = dict[str, Any]


class WandbReport(Callback):
    """Log predictions as tables, record the best validation, and alert if training fails; used together with W&B.

    Args:
        folder: the run folder, from which the predictions of the frozen base are read if it was evaluated.
        monitor: the validation score that decides.
        mode: ``max`` or ``min``.
    """

    def __init__(self, folder: Path, monitor: str, mode: str) -> None:
        self.folder, self.summaries = folder, {LOSS: "min", monitor: mode}
        self._base: dict[str, Mapping[Key, Mapping[str, Any]]] = {}
        self._losses: list[float] = []
        self._step, self._diverged = 0, False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the summary show the best validation, not the last."""
        for run in _runs(trainer):
            for name, best in self.summaries.items():
                run.define_metric(name, step_metric=STEP, summary=best)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Alert once if the losses stay above those at the beginning of training."""
        step, every = trainer.global_step, cast(Any, trainer).log_every_n_steps
        loss = trainer.callback_metrics.get("train/loss")
        if self._diverged or loss is None or step == self._step or step % every:
            return
        self._step = step
        self._losses.append(float(loss))
        first, last = self._losses[:WINDOW], self._losses[-WINDOW:]
        self._diverged = len(self._losses) >= 2 * WINDOW and fmean(last) > DIVERGED * fmean(first)
        if self._diverged:
            text = (
                f"step {step}: the average loss is {fmean(last):.4g} over the last {WINDOW} logged steps, but was "
                f"{fmean(first):.4g} over the first {WINDOW}: lower optimizer.lr"
            )
            self._alert(trainer, "training diverges", text, "WARN")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log rows of the validation; alert if its loss is NaN."""
        self._table(trainer, pl_module, "val")
        if math.isnan(trainer.callback_metrics.get(LOSS, 0.0)):
            self._alert(trainer, "NaN", f"step {trainer.global_step}: {LOSS} is NaN", "ERROR")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log rows of the test."""
        self._table(trainer, pl_module, "test")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the step of the best validation."""
        self._note_best(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Record the step of the best validation so far; alert if numbers are no longer finite."""
        self._note_best(trainer)
        if isinstance(exception, FloatingPointError):
            self._alert(trainer, "NaN", str(exception), "ERROR")

    def _note_best(self, trainer: Trainer) -> None:
        for checkpoint in trainer.checkpoint_callbacks:
            if isinstance(checkpoint, BestCheckpoint) and checkpoint.best:
                for run in _runs(trainer):
                    run.summary.update({"best_step": checkpoint.best.step, **self._bests(checkpoint)})

    def _bests(self, checkpoint: BestCheckpoint) -> dict[str, dict[str, float]]:
        """Return the best values over the whole run; after a resume, W&B's own summary covers only the last part."""
        found = {}
        for name, mode in self.summaries.items():
            values = [v.loss if name == LOSS else v.score for v in checkpoint.validations]
            if numbers := [value for value in values if not math.isnan(value)]:
                found[name] = {mode: min(numbers) if mode == "min" else max(numbers)}
        return found

    def _alert(self, trainer: Trainer, title: str, text: str, level: str) -> None:
        with _warning_of("an alert"):
            for run in _runs(trainer):
                run.alert(title, text, level)

    def _table(self, trainer: Trainer, module: Any, stage: str) -> None:
        """Log predictions; those of the base are columns in the adapter's table, not a separate table."""
        if trainer.sanity_checking or module.prefix:
            return
        compared = with_base(module.predictions, self._base_rows(stage))
        rows = [row for row in compared if row.keys() & {*COMPARED}]  # for other rows only the loss is known
        if not rows:
            return
        # rows are ordered by task, so each task is represented
        shown = rows[:: math.ceil(len(rows) / TABLE_ROWS[stage])]
        columns = list(dict.fromkeys(name for row in shown for name in row))
        data = [[_cell(row.get(name)) for name in columns] for row in shown]
        with _warning_of(f"the table {stage}/predictions"):
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.log_table(f"{stage}/predictions", columns, data, step=trainer.global_step)

    def _base_rows(self, stage: str) -> Mapping[Key, Mapping[str, Any]]:
        path = self.folder / "predictions" / f"base_{'validation' if stage == 'val' else stage}.jsonl"
        if not self._base.get(stage):
            self._base[stage] = read_predictions(path)
        return self._base[stage]


def with_base(rows: Sequence[Row], base: Mapping[Key, Mapping[str, Any]]) -> list[Row]:
    """Return the rows of a table: the adapter's answers and, where known, those of the base, with ``changed``."""
    shown = []
    for key, row in keyed(rows):
        row = {name: value for name, value in row.items() if name not in ("scores", "target_tokens")}
        if key in base:
            answer = "answer" if "answer" in row else "generated"
            names = [name for name in (*COMPARED, *base[key].get("scores", ())) if name in row]
            row |= {f"base_{name}": base[key].get(name) for name in names}
            row |= {"changed": row.get(answer) != base[key].get(answer)}
        shown.append(row)
    return shown


@contextmanager
def _warning_of(what: str) -> Iterator[None]:
    """Log a warning if W&B or the network fails, so that the run continues; its folder contains everything."""
    try:
        yield
    except Exception as error:
        log.warning("could not send %s to W&B: %s: %s", what, type(error).__name__, error)


def _cell(value: Any) -> Any:
    """Return a value that W&B can sort and filter: numbers and booleans as is, everything else as text."""
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def _runs(trainer: Trainer) -> list[Any]:
    return wandb_runs(trainer.loggers) if trainer.is_global_zero else []


def wandb_runs(loggers: Sequence[Logger]) -> list[Any]:
    """Return the W&B runs of the given loggers, in the first process."""
    return [logger.experiment for logger in loggers if isinstance(logger, WandbLogger)]


def finish_wandb(
    loggers: Sequence[Logger], results: Mapping[str, Any], adapter: Path | None = None, exit_code: int = 0
) -> None:
    """Write the results to the W&B summary, log the adapter and its data as artifacts, and finish the run.

    Failures are logged as warnings, because the run folder contains everything. ``exit_code`` is 0 for a run that
    completed, and 128 plus the signal number if it was stopped by a signal.
    """
    with _warning_of("the end of the run"):
        for run in wandb_runs(loggers):
            with _warning_of("the results"):
                run.summary.update(summary_of(results))
                if adapter is not None:
                    if not run.offline:  # W&B does not record the inputs of offline runs
                        run.use_artifact(data_artifact(results))
                    run.log_artifact(adapter_artifact(results, adapter, run.id))
            run.finish(exit_code)


def summary_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers and texts of ``results.json`` as flat columns for W&B.

    ``status`` is ``killed`` for a run stopped by a signal and ``failed`` for one that ended with an error. Validation
    scores of the selected checkpoint are under ``final/``, because ``val/`` contains those of the curve.
    """
    found = {name: value for name, value in results.items() if isinstance(value, str | int | float)}
    for name, value in results.get("metrics", {}).items():
        found[f"final/{name}" if name.startswith("val/") else name] = value
    if results.get("status") == "stopped":
        found["status"] = "killed" if results.get("signal") else "failed"
    return found


def adapter_artifact(results: Mapping[str, Any], folder: Path, run: str) -> Any:
    """Return the adapter as a W&B artifact, with its origin: run, base model, configuration, data."""
    import wandb

    facts = {name: results.get(name) for name in LINEAGE}
    scores = {name: value for name, value in results["metrics"].items() if name.startswith(("val/", "test/"))}
    artifact = wandb.Artifact(f"adapter-{run}", "model", metadata={"run": run, **facts, "scores": scores})
    artifact.add_dir(str(folder))
    return artifact


def data_artifact(results: Mapping[str, Any]) -> Any:
    """Return the data as a W&B artifact: only its fingerprints, by which W&B recognises it, not the rows."""
    import wandb

    versions = results["data_versions"]
    artifact = wandb.Artifact(f"data-{versions['family']}", "dataset", metadata=versions)
    with artifact.new_file("data_versions.json", encoding="utf-8") as file:
        json.dump(versions, file, indent=1, sort_keys=True)
    return artifact
