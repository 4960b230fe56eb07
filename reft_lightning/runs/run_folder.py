"""A run folder: ``config.yaml``, ``results.json``, ``predictions/``, ``checkpoints/``, ``adapter/`` and logs."""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..config.identity import differences
from ..config.schema import Config
from ..storage.atomic import hold_folder, release_folder, write_text
from ..storage.reading import read_yaml
from .results import RESULTS, read_results

log = logging.getLogger(__name__)

# what a run writes; its folder may also contain files of others
WRITTEN = (
    RESULTS, "config.yaml", "adapter", "checkpoints/best.ckpt", "checkpoints/last.ckpt", "csv", "csv_*", "predictions",
    "outputs/reft_*.json", "outputs/base_*.json", "evaluations",
)  # fmt: skip

_structured = cache(OmegaConf.structured)  # safe to cache, as merge copies it


def write_run_config(folder: Path, config: Config) -> None:
    """Write the resolved configuration."""
    write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(asdict(config))))


def load_run_config(folder: Path) -> Config:
    """Read the resolved configuration of a run folder.

    Raises:
        ValueError: if there is none, or if it is damaged or from another version.
    """
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a run folder: it has no config.yaml; give the folder that reft-train wrote"
        )
    values = read_yaml(path)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(_structured(Config), values))
    except OmegaConfBaseException as error:
        raise ValueError(
            f"{path} was written by another version of reft_lightning: {str(error).splitlines()[0]}"
        ) from error
    assert isinstance(config, Config)
    return config


def at_commit(config: Config, folder: Path) -> Config:
    """Return a configuration with the base model at the commit that the run in the folder recorded, if any."""
    commit = read_results(Path(folder)).get("model_commit")
    return replace(config, model=replace(config.model, revision=commit)) if commit else config


def other_base(folder: Path, fingerprint: str | None) -> str | None:
    """Return a message if a run recorded other weights of its base model than those with this fingerprint."""
    recorded = read_results(Path(folder)).get("model_fingerprint")
    if recorded is None or fingerprint in (None, recorded):
        return None
    return f"the base model has changed since the run in {folder} was made: its weights are not those it recorded"


def warn_of_other_base(folder: Path, fingerprint: str | None) -> None:
    """Warn if a run was made with other weights of its base model than those with this fingerprint."""
    if changed := other_base(folder, fingerprint):
        log.warning("%s", changed)


def is_complete(folder: Path) -> bool:
    """Whether a folder holds the results of a complete run."""
    try:
        return read_results(Path(folder)).get("status") == "complete"
    except (OSError, ValueError):
        return False


def check_free(folder: Path, overwrite: bool) -> None:
    """Refuse a folder whose complete run would be overwritten."""
    if is_complete(folder) and not overwrite:
        raise ValueError(
            f"{folder} holds a complete run: give another folder, or leave out hydra.run.dir and hydra.sweep.dir; to "
            "replace that run, add overwrite=true"
        )


def make_room(folder: Path, overwrite: bool) -> None:
    """Make sure that a folder holds no other run; with ``overwrite``, remove what that run wrote."""
    check_free(folder, overwrite)
    if not (folder / RESULTS).is_file():
        return
    if not overwrite:
        raise ValueError(
            f"{folder} holds an unfinished run: continue it with reft-train resume={folder}, or give another folder; "
            "to replace that run, add overwrite=true"
        )
    for path in (path for name in WRITTEN for path in folder.glob(name)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def begun(folder: Path) -> bool:
    """Whether a folder holds a run, in any state."""
    return (Path(folder) / "config.yaml").is_file()


def hold(folder: Path) -> None:
    """Keep other processes from working on a run until this one ends or is killed."""
    if not hold_folder(folder):
        raise ValueError(f"another process is working on the run in {folder}: wait until it ends, or stop it")


def find_unfinished(parent: Path, config: Config) -> Path | None:
    """Return the newest unfinished run of a configuration that no process is working on, and hold it.

    ``parent`` is ``outputs/NAME``, whose folders are named by their time. Two processes that ask at the same time get
    different runs.
    """
    for folder in sorted((path.parent for path in parent.glob("*/config.yaml")), reverse=True):
        try:
            if is_complete(folder) or differences(load_run_config(folder), config) or not hold_folder(folder):
                continue
        except (ValueError, OSError):  # damaged, from another version, or not writable
            continue
        if not is_complete(folder):  # its process may have completed it meanwhile
            return folder
        release_folder(folder)
    return None


def last_checkpoint(folder: Path) -> Path:
    """Return the path of the checkpoint that an interrupted run continues from."""
    return Path(folder) / "checkpoints" / "last.ckpt"
