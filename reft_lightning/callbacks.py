"""Lightning callbacks and loggers of a run: checkpoints, progress, and what W&B shows."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from .schema import CallbacksConfig, LoggerConfig

log = logging.getLogger(__name__)
TABLE_ROWS = 100  # predictions shown in a W&B table


def build_callbacks(config: CallbacksConfig, folder: Path, progress: bool) -> list[Callback]:
    """Return the callbacks: ``best.ckpt`` by the monitored metric, ``last.ckpt`` also when a run is interrupted."""
    checkpoints = folder / "checkpoints"
    best = ModelCheckpoint(
        checkpoints, filename="best", monitor=config.monitor, mode=config.mode, save_top_k=1,
        enable_version_counter=False, save_on_train_epoch_end=False,
    )  # fmt: skip
    last = ModelCheckpoint(
        checkpoints, filename="last", every_n_train_steps=config.checkpoint_every_n_steps, save_on_exception=True,
        enable_version_counter=False,
    )  # fmt: skip
    callbacks: list[Callback] = [best, last, LearningRateMonitor("step")]
    if config.early_stopping_patience is not None:
        callbacks.append(
            EarlyStopping(config.monitor, mode=config.mode, patience=config.early_stopping_patience)
        )
    if progress:
        callbacks.append(RichProgressBar())
    return callbacks


def build_loggers(config: LoggerConfig, folder: Path, values: dict[str, Any]) -> list[Logger]:
    """Return the CSV logger, and W&B and TensorBoard where asked for.

    Without a key W&B runs offline and the log says how to sync later.
    """
    loggers: list[Logger] = [CSVLogger(folder, name="", version="csv")]
    if config.tensorboard:
        loggers.append(TensorBoardLogger(folder, name="", version="tensorboard"))
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
        """Log the first rows of the validation."""
        self._table(trainer, module, "val/predictions")

    def on_test_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Log the first rows of the test."""
        self._table(trainer, module, "test/predictions")

    def _table(self, trainer: Trainer, module: Any, key: str) -> None:
        from lightning.pytorch.loggers import WandbLogger

        rows = module.predictions[:TABLE_ROWS]
        if trainer.sanity_checking or not rows:
            return
        columns = list(rows[0])
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table(
                    key, columns=columns, data=[[str(row.get(c)) for c in columns] for row in rows]
                )


def finish_wandb(loggers: list[Logger], summary: dict[str, Any], adapter: Path, log_adapter: bool) -> None:
    """Write the results into the W&B summary, upload the adapter as an artifact, and close the run."""
    from lightning.pytorch.loggers import WandbLogger

    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            run = logger.experiment
            run.summary.update(summary)
            if log_adapter and adapter.is_dir():
                artifact = wandb.Artifact(f"adapter-{run.id}", type="model")
                artifact.add_dir(str(adapter))
                run.log_artifact(artifact)
            run.finish()
