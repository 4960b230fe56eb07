"""Lightning callbacks and loggers of a run: checkpoints, progress, and what W&B shows."""

from __future__ import annotations

import itertools
import logging
import os
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger

from .resume import LastCheckpoint
from .schema import CallbacksConfig, LoggerConfig

log = logging.getLogger(__name__)
TABLE_ROWS = 100  # predictions shown in a W&B table


def build_callbacks(config: CallbacksConfig, folder: Path, progress: bool) -> list[Callback]:
    """Return the callbacks: ``best.ckpt`` by the monitored metric, ``last.ckpt`` to go on from."""
    checkpoints = folder / "checkpoints"
    best = ModelCheckpoint(
        checkpoints, filename="best", monitor=config.monitor, mode=config.mode, save_top_k=1,
        enable_version_counter=False, save_on_train_epoch_end=False,
    )  # fmt: skip
    last = LastCheckpoint(checkpoints / "last.ckpt", config.checkpoint_every_n_steps, torch.get_rng_state())
    callbacks: list[Callback] = [best, last, LearningRateMonitor("step")]  # last knows of the best
    if config.early_stopping_patience is not None:
        callbacks.append(
            EarlyStopping(config.monitor, mode=config.mode, patience=config.early_stopping_patience)
        )
    if progress:
        callbacks.append(RichProgressBar())
    return callbacks


def build_loggers(config: LoggerConfig, folder: Path, values: dict[str, Any]) -> list[Logger]:
    """Return the CSV logger, and W&B where asked for.

    Without a key W&B runs offline and the log says how to sync later.
    """
    # CSVLogger empties a folder that it finds: a resumed run writes beside the log of its first part
    parts = ("csv" if part == 1 else f"csv_{part}" for part in itertools.count(1))
    version = next(part for part in parts if not (folder / part / "metrics.csv").is_file())
    loggers: list[Logger] = [CSVLogger(folder, name="", version=version)]
    if config.wandb:
        loggers.append(_wandb_logger(config, folder, values))
    return loggers


def _wandb_logger(config: LoggerConfig, folder: Path, values: dict[str, Any]) -> Logger:
    from lightning.pytorch.loggers import WandbLogger

    mode = config.mode or os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
    if mode == "offline":
        log.info(
            "W&B runs offline; to upload this run later: wandb sync %s", folder / "wandb" / "offline-run-*"
        )
    return WandbLogger(
        project=config.project, entity=config.entity, group=config.group, name=config.name or folder.name,
        tags=list(config.tags), save_dir=folder, config=values, mode=mode,
    )  # fmt: skip


def _has_wandb_key() -> bool:
    import netrc

    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].rstrip("/")
    try:
        return netrc.netrc().authenticators(host) is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


class WandbReport(Callback):
    """Log a table of predictions after each validation and test; used where W&B is."""

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Log rows of the validation."""
        self._table(trainer, module, "val/predictions")

    def on_test_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Log rows of the test."""
        self._table(trainer, module, "test/predictions")

    def _table(self, trainer: Trainer, module: Any, key: str) -> None:
        from lightning.pytorch.loggers import WandbLogger

        step = max(1, len(module.predictions) // TABLE_ROWS)  # some of every task: rows come task by task
        rows = module.predictions[::step][:TABLE_ROWS]
        if trainer.sanity_checking or not rows:
            return
        columns = list(rows[0])
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table(
                    f"{module.prefix}{key}",
                    columns=columns,
                    data=[[str(row.get(c)) for c in columns] for row in rows],
                )


def finish_wandb(
    loggers: list[Logger], summary: dict[str, Any], adapter: Path | None, exit_code: int = 0
) -> None:
    """Write the results into the W&B summary, upload the adapter as an artifact, and close the run.

    Args:
        loggers: of the first process; W&B's may be among them.
        summary: contents of ``results.json``.
        adapter: its folder, or None not to upload it.
        exit_code: 0 for a run that is complete.
    """
    from lightning.pytorch.loggers import WandbLogger

    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            run = logger.experiment
            run.summary.update(summary)
            if adapter is not None:
                artifact = wandb.Artifact(f"adapter-{run.id}", type="model")
                artifact.add_dir(str(adapter))
                run.log_artifact(artifact)
            run.finish(exit_code)
