"""Checkpoint files: written atomically, and read without running code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from ..storage.atomic import write_whole


class WholeCheckpoints(TorchCheckpointIO):
    """Write each checkpoint next to its destination, flush it, and move it there.

    Lightning's own writer moves it from the folder for temporary files. If that is on another file system, this is a
    copy, and a full disk or a kill then leaves half a file in place of the last good one.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint."""
        if "://" in str(path):  # not a file on this machine
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)

        def write(partial: Path) -> None:
            with partial.open(
                "wb"
            ) as file:  # a file object, not its name, so that torch raises OSError if the disk is full
                torch.save(checkpoint, file)

        write_whole(path, write)


def read_checkpoint(path: Path, trust_code: bool = False) -> dict[str, Any]:
    """Return a checkpoint, which may contain tensors, numbers, texts and containers of them.

    Args:
        path: path of the file.
        trust_code: whether to allow other objects, which run code when they are read.

    Raises:
        ValueError: if the file is damaged or contains other objects.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust_code)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or contains objects other than tensors and numbers, which can run code when they are "
            f"read; if you trust whoever wrote it, add trust_code=true ({_reason(error)})"
        ) from error
    except (EOFError, RuntimeError, KeyError) as error:
        raise ValueError(f"{path} is damaged and cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
