"""How a run is organised in W&B: project, group, job type, name, tags, configuration.

A group contains the runs of an experiment, a sweep, or a study. The job type is ``train``, ``eval``, ``trial`` or
``winner``. The name says how a run differs from the others of its group.
"""

from __future__ import annotations

import inspect
import logging
import os
import secrets
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning import Trainer

from ..config.identity import config_hash, identity, nested, used_settings
from ..config.schema import Config
from ..suggest import check_choice, did_you_mean
from .arguments import method_of
from .wandb_key import check_home, has_key

log = logging.getLogger(__name__)
MODES = ("online", "offline", "disabled")
TAG_LENGTH = 64  # W&B's limits, in characters
NAME_LENGTH = 128
# seconds that W&B has to upload the rest at the end of a run; `wandb sync` uploads what is left
FINISH = 600
# config groups whose choices are part of a name
GROUPS = ("model", "data", "optimizer", "scheduler", "objective")


def is_wandb(entry: Any) -> bool:
    """Whether an entry of ``logger`` is W&B's."""
    return isinstance(entry, Mapping) and str(entry.get("_target_", "")).endswith("WandbLogger")


def filed(config: Config, **names: str) -> Config:
    """Return a configuration whose W&B entries get these names, such as ``group``, unless they set their own."""
    entries = {
        key: {**names, **{k: v for k, v in entry.items() if v is not None or k not in names}}
        if is_wandb(entry) else entry
        for key, entry in config.logger.items()
    }  # fmt: skip
    return replace(config, logger=entries)


def label(config: Config, overrides: Iterable[str], method: str | None = None) -> str:
    """Return the name of a run: its method, the overrides that identify it, and its seed.

    A study may give its own name for the method.

    >>> label(Config(), ["optimizer.lr=1e-3", "seed=42", "logger=wandb"])
    'loreft lr=1e-3 seed=42'
    """
    known, told = identity(config, seed=False), []
    for text in overrides:
        key, _, value = text.lstrip("+~").partition("=")
        if key in GROUPS:
            told.append(value)
        elif key != "intervention.method" and known.get(key) is not None:
            told.append(f"{key.rpartition('.')[2]}={value}")
    seed = f" seed={config.seed}"  # kept if the rest is truncated: runs may differ only in their seed
    return " ".join([method or method_of(config), *told])[: NAME_LENGTH - len(seed)] + seed


def wandb_arguments(
    entry: Mapping[str, Any],
    config: Config,
    folder: Path,
    earlier: str | None = None,
    inside: Path | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the W&B logger's entry, completed and without our own keys, and its folder and config arguments.

    Without a key W&B runs offline. ``earlier`` is the id of the W&B run to continue, ``inside`` the folder where W&B
    writes, by default the run folder.
    """
    values = {key: value for key, value in entry.items() if key != "log_adapter"}
    offline = "offline" if values.pop("offline", False) else None
    mode = values.get("mode") or offline or os.environ.get("WANDB_MODE")
    if mode is None:
        mode = "online" if has_key() else "offline"
    mode = {"dryrun": "offline"}.get(mode, mode)  # W&B's old name for it
    check_choice("logger.wandb.mode" if values.get("mode") else "WANDB_MODE", mode, MODES)
    inside = inside or folder
    if mode == "offline":
        runs = f"{shlex.quote(str(inside / 'wandb'))}/offline-run-*"
        log.info("W&B runs offline; to upload this run later: wandb sync %s", runs)
    given = values.pop("tags", None) or ()
    given = [given] if isinstance(given, str) else given
    tags = [*given, method_of(config), config.model.name, config.data.family]
    agent = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
    own = {
        "name": f"{label(config, ())} {folder.name}",
        "group": _group(folder),
        "job_type": "train",
        "id": earlier or agent or secrets.token_hex(4),
        "resume": "allow" if earlier else None,
    }
    if "WANDB_FINISH_TIMEOUT" not in os.environ:  # by default W&B waits forever if the network is down
        own["settings"] = {"finish_timeout": FINISH, **(values.pop("settings", None) or {})}
    own |= {key: value for key, value in values.items() if value is not None}
    tags = list(dict.fromkeys(tag[:TAG_LENGTH] for tag in tags))
    return own | {"mode": mode, "tags": tags}, {"save_dir": str(inside), "config": shown_config(config)}


def _group(folder: Path) -> str:
    """Return the name of a sweep's folder, or of the folder of an experiment's runs."""
    parent = Path(folder).absolute().parent
    return f"{parent.parent.name}/{parent.name}" if parent.name.startswith("multirun_") else parent.name


def shown_config(config: Config) -> dict[str, Any]:
    """Return what identifies a run, in sections, without uninformative values.

    These are empty and false values, settings that do not apply to the method, and Trainer arguments with Lightning's
    default.
    """
    defaults = {
        f"trainer.{name}": p.default for name, p in inspect.signature(Trainer.__init__).parameters.items()
    }
    settings = {
        key: value for key, value in used_settings(identity(config)).items()
        if value is not None and value is not False and value not in ([], {}, "") and value != defaults.get(key)
    }  # fmt: skip
    return nested(settings) | {"method": method_of(config), "config_hash": config_hash(config)}


def check_wandb(where: str, cls: type, entry: Mapping[str, Any]) -> None:
    """Refuse arguments that W&B would reject only after the run has started."""
    import wandb

    check_home()
    taken = {"log_adapter"}.union(*(inspect.signature(what).parameters for what in (cls, wandb.init)))
    for name in entry:
        if name not in taken and not name.startswith("_"):
            raise ValueError(
                f"{where}.{name}: not an argument of {cls.__name__} or wandb.init{did_you_mean(name, taken)}"
            )


def logs_adapter(config: Config) -> bool:
    """Whether a logger uploads the adapter."""
    return any(entry.get("log_adapter", False) for entry in config.logger.values())
