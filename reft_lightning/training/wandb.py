"""What W&B shows of a run: curves in sections, predictions next to the base's, alerts, the results, the adapter.

Sections are the first parts of names: ``train/``, ``val/``, ``test/``, ``base/`` (the frozen base), ``progress/``
(tokens, seconds, memory, learning rates) and ``edit/``, which is kept for what a callback measures of interventions.
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

STEP = "trainer/global_step"  # the axis of every curve, Lightning's
TABLE_ROWS = {"val": 100, "test": 1000}  # predictions in a table; those of a validation are logged every time
COMPARED = ("generated", "answer", "option", "correct")  # of a row, adapter next to base
# what the metadata of an adapter's artifact takes from results.json
LINEAGE = (
    "method", "model", "seed", "config_hash", "git_commit", "trainable_parameters", "best_step", "data_versions"
)  # fmt: skip
WINDOW = 10  # logged losses
DIVERGED = 1.5  # times the loss with which training began

Row = dict[str, Any]


class WandbReport(Callback):
    """Log predictions as tables, note the best validation, and alert where training fails; used where W&B is.

    Args:
        folder: of the run; the predictions of the frozen base are read from it, where it was evaluated.
        monitor: the validation score that decides.
        mode: ``max`` or ``min``.
    """

    def __init__(self, folder: Path, monitor: str, mode: str) -> None:
        self.folder, self.summaries = folder, {LOSS: "min", monitor: mode}
        self._base: dict[str, Mapping[Key, Mapping[str, Any]]] = {}
        self._losses: list[float] = []
        self._step, self._diverged = 0, False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the summary hold the best validation, and not the last."""
        for run in _runs(trainer):
            for name, best in self.summaries.items():
                run.define_metric(name, step_metric=STEP, summary=best)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Alert once where losses stay above those with which training began."""
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
                f"step {step}: the loss is {fmean(last):.4g} on average over the last {WINDOW} that were logged, and "
                f"was {fmean(first):.4g} over the first {WINDOW}: lower optimizer.lr"
            )
            self._alert(trainer, "training diverges", text, "WARN")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log rows of the validation; alert where its loss is not a number."""
        self._table(trainer, pl_module, "val")
        if math.isnan(trainer.callback_metrics.get(LOSS, 0.0)):
            self._alert(trainer, "NaN", f"step {trainer.global_step}: {LOSS} is not a number", "ERROR")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log rows of the test."""
        self._table(trainer, pl_module, "test")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the step of the best validation."""
        self._note_best(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Note the step of the best validation so far; alert where numbers are no longer finite."""
        self._note_best(trainer)
        if isinstance(exception, FloatingPointError):
            self._alert(trainer, "NaN", str(exception), "ERROR")

    def _note_best(self, trainer: Trainer) -> None:
        for checkpoint in trainer.checkpoint_callbacks:
            if isinstance(checkpoint, BestCheckpoint) and checkpoint.best:
                for run in _runs(trainer):
                    run.summary.update({"best_step": checkpoint.best.step, **self._bests(checkpoint)})

    def _bests(self, checkpoint: BestCheckpoint) -> dict[str, dict[str, float]]:
        """Return the best values over all parts of a run: of a resumed one, W&B's own summary knows the last part."""
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
        """Log predictions; those of the base are columns of the adapter's table, and no table of their own."""
        if trainer.sanity_checking or module.prefix:
            return
        compared = with_base(module.predictions, self._base_rows(stage))
        rows = [row for row in compared if row.keys() & {*COMPARED}]  # of others only the loss is known
        if not rows:
            return
        shown = rows[
            :: math.ceil(len(rows) / TABLE_ROWS[stage])
        ]  # some of every task: rows come task by task
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
    """Return the columns of a table: what the adapter answers, where the base is known its answer, and ``changed``."""
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
    """Let a run go on where W&B, or the network, fails: its folder holds everything."""
    try:
        yield
    except Exception as error:
        log.warning("W&B could not take %s: %s: %s", what, type(error).__name__, error)


def _cell(value: Any) -> Any:
    """Return what W&B can sort and filter: numbers and truth values as they are, everything else as text."""
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def _runs(trainer: Trainer) -> list[Any]:
    return wandb_runs(trainer.loggers) if trainer.is_global_zero else []


def wandb_runs(loggers: Sequence[Logger]) -> list[Any]:
    """Return the W&B runs of some loggers, in the first process."""
    return [logger.experiment for logger in loggers if isinstance(logger, WandbLogger)]


def finish_wandb(
    loggers: Sequence[Logger], results: Mapping[str, Any], adapter: Path | None = None, exit_code: int = 0
) -> None:
    """Write the results into the W&B summary, file the adapter and the data it saw, and close the run.

    What fails there is a warning: the run folder holds everything.

    Args:
        loggers: of the first process; W&B's may be among them.
        results: contents of ``results.json``.
        adapter: its folder, or None not to upload it.
        exit_code: 0 for a run that ended as it should; 128 and the signal's number where it was told to stop.
    """
    with _warning_of("the end of the run"):
        for run in wandb_runs(loggers):
            with _warning_of("the results"):
                run.summary.update(summary_of(results))
                if adapter is not None:
                    if not run.offline:  # W&B keeps no inputs of a run that is
                        run.use_artifact(data_artifact(results))
                    run.log_artifact(adapter_artifact(results, adapter, run.id))
            run.finish(exit_code)


def summary_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers and words of ``results.json``, flat, as W&B's columns.

    ``status`` tells a run that was told to stop, ``killed``, from one that ``failed``. The validation scores of the
    checkpoint that counts are under ``final/``, as those under ``val/`` are of the curve.
    """
    found = {name: value for name, value in results.items() if isinstance(value, str | int | float)}
    for name, value in results.get("metrics", {}).items():
        found[f"final/{name}" if name.startswith("val/") else name] = value
    if results.get("status") == "stopped":
        found["status"] = "killed" if results.get("signal") else "failed"
    return found


def adapter_artifact(results: Mapping[str, Any], folder: Path, run: str) -> Any:
    """Return the adapter as a W&B artifact, with where it comes from: run, base model, configuration, data."""
    import wandb

    facts = {name: results.get(name) for name in LINEAGE}
    scores = {name: value for name, value in results["metrics"].items() if name.startswith(("val/", "test/"))}
    artifact = wandb.Artifact(f"adapter-{run}", "model", metadata={"run": run, **facts, "scores": scores})
    artifact.add_dir(str(folder))
    return artifact


def data_artifact(results: Mapping[str, Any]) -> Any:
    """Return the data as a W&B artifact: its fingerprints, by which W&B knows it again, and no rows."""
    import wandb

    versions = results["data_versions"]
    artifact = wandb.Artifact(f"data-{versions['family']}", "dataset", metadata=versions)
    with artifact.new_file("data_versions.json", encoding="utf-8") as file:
        json.dump(versions, file, indent=1, sort_keys=True)
    return artifact
