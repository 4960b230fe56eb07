"""Build the Trainer of a run, with the built-in callbacks and loggers and those of the configuration."""

from __future__ import annotations

import inspect
import itertools
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning import Callback, Trainer
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import LearningRateMonitor, ProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.plugins import CheckpointIO, LayerSync, Precision
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from ..config.schema import CheckpointConfig, Config
from ..suggest import trusted
from ..terminal.ranks import srun_tasks
from ..training.best_checkpoint import BestCheckpoint
from ..training.checkpoint_files import WholeCheckpoints
from ..training.last_checkpoint import LastCheckpoint
from ..training.progress import RunProgress
from ..training.sharded_base import InStep, ShardedBase
from ..training.wandb import WandbReport
from .arguments import imported
from .checks import Monitor, check_callbacks
from .results import read_results
from .stopping import StopTogether
from .wandb_names import NAME_LENGTH, check_wandb, is_wandb, shown_config, wandb_arguments

log = logging.getLogger(__name__)
KINDS = (
    Callback,
    Logger,
    Profiler,
    Strategy,
    Accelerator,
    Precision,
    CheckpointIO,
    ClusterEnvironment,
    LayerSync,
)


def build_trainer(
    config: Config,
    folder: Path,
    monitor: Monitor,
    random_state: Tensor,
    first: Sequence[Callback] = (),
    validated: bool = True,
) -> Trainer:
    """Return the Trainer with its callbacks, those in ``first`` before all others, and its loggers.

    ``random_state`` is that at the start of training; ``validated`` says whether there are validation rows.
    """
    arguments = {name: _object(f"trainer.{name}", value) for name, value in asdict(config.trainer).items()}
    if not validated:
        arguments["limit_val_batches"] = 0
    arguments["default_root_dir"] = arguments["default_root_dir"] or folder
    given = arguments["plugins"] or []
    plugins = list(given) if isinstance(given, list | tuple) else [given]
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins.append(WholeCheckpoints())
    if not any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
        environment = cluster_environment(config.trainer.num_nodes)
        plugins += [environment] if environment else []
    arguments["plugins"] = plugins
    loggers = build_loggers(config, folder)
    callbacks = [*first, StopTogether()]
    if isinstance(arguments["strategy"], ShardedBase):
        callbacks.append(InStep())
        arguments["inference_mode"] = False  # weights gathered in inference mode cannot be used in training
    if config.trainer.enable_checkpointing is not False:
        callbacks += build_callbacks(config.checkpoint, monitor, folder, random_state)
    if loggers:
        callbacks.append(LearningRateMonitor("step"))
    own = [_of_kind(f"callbacks.{name}", entry, Callback) for name, entry in config.callbacks.items()]
    check_callbacks(config, own)
    if config.trainer.enable_progress_bar and not any(isinstance(one, ProgressBar) for one in own):
        callbacks.append(RunProgress())
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        callbacks.append(WandbReport(folder, *monitor))
    callbacks += own
    try:
        return Trainer(**arguments, callbacks=callbacks, logger=loggers)
    except TypeError as error:
        raise ValueError(f"trainer: {error}") from error


def cluster_environment(num_nodes: int) -> ClusterEnvironment | None:
    """Return what tells the ranks of a SLURM job from each other; None where Lightning finds the right one.

    Lightning takes every process within a job for one that srun started, and waits for the others, except in a job
    named bash or interactive, where it waits for none. Here a command that srun starts once, or not at all, starts its
    ranks itself, as outside SLURM, whatever the job's name.

    Raises:
        ValueError: if it cannot, or for the wrong arguments of srun.
    """
    if "SLURM_NTASKS" not in os.environ or TorchElasticEnvironment.detect():
        return None
    if srun_tasks() > 1:
        if "SLURM_NTASKS_PER_NODE" not in os.environ:  # Lightning needs it
            raise ValueError(
                f"srun started {srun_tasks()} processes without --ntasks-per-node: replace --ntasks (-n) by "
                "--ntasks-per-node=N, with N the value of trainer.devices"
            )
        return SLURMEnvironment(auto_requeue=False)  # the launcher decides about requeuing
    if num_nodes > 1:
        raise ValueError(
            f"trainer.num_nodes={num_nodes} in a SLURM job: start the command with srun --nodes={num_nodes} "
            "--ntasks-per-node=N, with N the value of trainer.devices"
        )
    return LightningEnvironment()


def check_ranks(trainer: Trainer) -> None:
    """Refuse a run for which srun or torchrun started another number of processes than it uses.

    Lightning compares them when it starts training, and not at all in a run of one device.
    """
    if TorchElasticEnvironment.detect():
        started, each = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
        who, again = "torchrun", "--nnodes={} --nproc-per-node={}"
        nodes = started // each
    elif srun_tasks() > 1:
        started, nodes = srun_tasks(), int(os.environ["SLURM_NNODES"])
        who, again = "srun", "--nodes={} --ntasks-per-node={}"
    else:
        return
    used, devices = trainer.num_nodes, trainer.num_devices
    if (nodes, started) == (used, used * devices):
        return
    even = (
        f", or set trainer.num_nodes={nodes} trainer.devices={started // nodes}"
        if started % nodes == 0
        else ""
    )
    raise ValueError(
        f"{who} started {started} process{'es' if started > 1 else ''} on {nodes} node{'s' if nodes > 1 else ''}, but "
        f"trainer.num_nodes={used} and trainer.devices={devices} need {used * devices}, {devices} on each node: start "
        f"the command with {who} {again.format(used, devices)}{even}"
    )


def build_callbacks(
    config: CheckpointConfig, monitor: Monitor, folder: Path, random_state: Tensor
) -> list[Callback]:
    """Return the callbacks of every run: ``best.ckpt`` by the monitored score, ``last.ckpt`` to resume from."""
    checkpoints = folder / "checkpoints"
    best = BestCheckpoint(
        checkpoints / "best.ckpt", monitor.name, monitor.mode, config.early_stopping_patience
    )
    last = LastCheckpoint(checkpoints / "last.ckpt", config.every_n_steps, random_state)
    return [best, last]  # in this order, as `last` also saves the state of `best`


def build_loggers(config: Config, folder: Path) -> list[Logger]:
    """Return the CSV logger, which every run has, and those of the configuration.

    A resumed run continues the W&B run of its first part.
    """
    # CSVLogger empties an existing folder, so a resumed run writes next to the log of its first part
    parts = ("csv" if part == 1 else f"csv_{part}" for part in itertools.count(1))
    free = (part for part in parts if not (folder / part / "metrics.csv").is_file())
    loggers: list[Logger] = [CSVLogger(folder, name="", version=next(free) if config.resume else "csv")]
    earlier = read_results(folder).get("wandb_run") if config.resume else None
    for name, entry in config.logger.items():
        where = f"logger.{name}"
        cls = _target(where, entry)
        if inspect.isclass(cls) and issubclass(cls, WandbLogger):
            check_wandb(where, cls, entry)
            entry, given = wandb_arguments(entry, config, folder, earlier)
        else:
            takes_folder = "save_dir" in inspect.signature(cls).parameters and "save_dir" not in entry
            given = {"save_dir": str(folder)} if takes_folder else {}
        loggers.append(_of_kind(where, entry, Logger, given))
    return loggers


def log_settings(loggers: Sequence[Logger], config: Config) -> None:
    """Log what identifies the run as hyperparameters; the W&B logger gets it when it is created."""
    for logger in loggers[1:]:  # the first writes to the run folder, which has config.yaml
        if not isinstance(logger, WandbLogger):
            logger.log_hyperparams(shown_config(config))


def evaluation_loggers(config: Config, folder: Path, target: Path, split: str) -> list[Logger]:
    """Return the loggers of an evaluation, writing to ``target``: only W&B's, in the group of the run."""
    loggers: list[Logger] = []
    for name, entry in config.logger.items():
        if is_wandb(entry):
            # a W&B run of its own, online or offline as this machine allows
            entry = {k: v for k, v in entry.items() if k not in ("id", "version")}
            if entry.get("mode") != "disabled":
                entry["mode"] = None
            own, given = wandb_arguments(entry, config, folder, inside=target)
            own |= {"job_type": "eval", "name": f"{own['name'][: NAME_LENGTH - 20]}, {split}"}
            loggers.append(_of_kind(f"logger.{name}", own, Logger, given))
    return loggers


# --- objects that the configuration names -----------------------------------------------------------------------


def _object(where: str, value: Any, given: Mapping[str, Any] | None = None) -> Any:
    """Create the object of an entry with a ``_target_``, also inside a list; return any other value as is."""
    if isinstance(value, list):
        return [_object(where, item) for item in value]
    if not isinstance(value, Mapping) or "_target_" not in value:
        return value
    _target(where, value)
    if not trusted():
        _check_classes(where, value)
    try:
        return instantiate({**value, "_partial_": True}, _convert_="all")(**given or {})
    except Exception as error:  # a constructor may raise anything
        cause = error.__cause__ or error
        raise ValueError(f"{where}: cannot create {value['_target_']}: {cause}") from error


def _check_classes(where: str, value: Any) -> None:
    """Refuse any ``_target_`` from an untrusted folder that is not a subclass of one of ``KINDS``."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            target = _target(where, value)
            if not (inspect.isclass(target) and issubclass(target, KINDS)):
                raise ValueError(
                    f"{where}: {value['_target_']} is not a callback, logger, profiler, strategy or plugin of "
                    "Lightning, and calling it could run any code; if you trust its author, add trust_code=true"
                )
        value = list(value.values())
    if isinstance(value, str) and "${" in value:  # Hydra would resolve it once more, possibly to an object
        raise ValueError(
            f"{where}: {value!r} is resolved when it is used, and could run any code; if you trust its author, add "
            "trust_code=true"
        )
    for item in value if isinstance(value, list) else ():
        _check_classes(where, item)


def _of_kind(where: str, entry: Any, kind: type, given: Mapping[str, Any] | None = None) -> Any:
    _target(where, entry)
    made = _object(where, entry, given)
    if not isinstance(made, kind):
        raise ValueError(f"{where} must be a {kind.__name__} of lightning; got {made!r}")
    return made


def _target(where: str, entry: Any) -> Any:
    if not isinstance(entry, Mapping) or "_target_" not in entry:
        raise ValueError(
            f"{where} needs a _target_, the import path of a class: +{where}._target_=...; got {entry!r}"
        )
    return imported(where, entry["_target_"])


def quiet_lightning() -> None:
    """Keep Lightning's tips, device listings and warnings about its own code out of the log."""
    # lightning 2.6 calls a function that torch 2.13 deprecates
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
    # an edited block returns a view; no transformers model modifies a block's output in place
    warnings.filterwarnings("ignore", ".*FSDP2-wrapped module .* returned a view tensor", UserWarning)
    # cluster_environment decides about srun
    warnings.filterwarnings(
        "ignore", "The `srun` command is available on your system but is not used", UserWarning
    )
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for asked_for in ("profilers", "callbacks"):  # reports, summaries, and what `verbose` adds
        logging.getLogger(f"lightning.pytorch.{asked_for}").setLevel(logging.INFO)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    # its only message is that a rank died and the others are killed
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
