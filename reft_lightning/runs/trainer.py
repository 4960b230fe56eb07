"""Lightning callbacks and loggers of a run: checkpoints, progress, and what W&B shows."""

from __future__ import annotations

import itertools
import logging
import os
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger
from omegaconf import OmegaConf
from torch import Tensor

from ..config.schema import CallbacksConfig, Config, LoggerConfig
from ..training.last_checkpoint import LastCheckpoint
from ..training.wandb import WandbReport
from .checks import Monitor

log = logging.getLogger(__name__)


def build_callbacks(
    config: CallbacksConfig, monitor: Monitor, folder: Path, random_state: Tensor, progress: bool
) -> list[Callback]:
    """Return the callbacks: ``best.ckpt`` by the monitored metric, ``last.ckpt`` to go on from."""
    checkpoints = folder / "checkpoints"
    best = ModelCheckpoint(
        checkpoints, filename="best", monitor=monitor.name, mode=monitor.mode, save_top_k=1,
        enable_version_counter=False, save_on_train_epoch_end=False,
    )  # fmt: skip
    last = LastCheckpoint(checkpoints / "last.ckpt", config.checkpoint_every_n_steps, random_state)
    callbacks: list[Callback] = [best, last, LearningRateMonitor("step")]  # last knows of the best
    if config.early_stopping_patience is not None:
        callbacks.append(
            EarlyStopping(monitor.name, mode=monitor.mode, patience=config.early_stopping_patience)
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


def build_trainer(
    config: Config, folder: Path, monitor: Monitor, random_state: Tensor, validated: bool = True
) -> Trainer:
    """Return the Trainer with its callbacks and loggers.

    Args:
        config: of the run.
        folder: of the run.
        monitor: decides which checkpoint counts.
        random_state: where training's random numbers start.
        validated: whether there are validation rows.
    """
    values = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    arguments = asdict(config.trainer)
    if not validated:
        arguments["limit_val_batches"] = 0
    callbacks = build_callbacks(
        config.callbacks, monitor, folder, random_state, config.trainer.enable_progress_bar
    )
    if config.logger.wandb:
        callbacks.append(WandbReport())
    return Trainer(
        **arguments, default_root_dir=folder, callbacks=callbacks,
        logger=build_loggers(config.logger, folder, values), use_distributed_sampler=False,
        enable_model_summary=False,
    )  # fmt: skip


def quiet_lightning() -> None:
    """Keep Lightning's tips, device listings and a warning about its own code out of the log."""
    warnings.filterwarnings(
        "ignore", ".*LeafSpec.*", FutureWarning
    )  # lightning 2.6 calls what torch 2.13 deprecates
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
