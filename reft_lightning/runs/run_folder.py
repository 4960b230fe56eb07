"""A run folder: ``config.yaml``, ``results.json``, ``predictions/``, ``checkpoints/``, ``adapter/`` and logs."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..config.schema import Config
from ..storage.atomic import write_text


def write_run_config(folder: Path, config: Config) -> None:
    """Write the resolved configuration."""
    write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))


def load_run_config(folder: Path) -> Config:
    """Read the resolved configuration of a run folder.

    Raises:
        ValueError: if the folder holds none.
    """
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a run folder: it has no config.yaml; give the folder that reft-train named"
        )
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path)))
    except OmegaConfBaseException as error:
        raise ValueError(
            f"{path} was written by another version of reft_lightning: {str(error).splitlines()[0]}"
        ) from error
    assert isinstance(config, Config)
    return config


def last_checkpoint(folder: Path) -> Path:
    """Return where an interrupted run continues from."""
    return Path(folder) / "checkpoints" / "last.ckpt"
