"""Checkpoint files: written whole or not at all, and read without running code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from ..storage.atomic import write_whole


class WholeCheckpoints(TorchCheckpointIO):
    """Write each checkpoint next to its place, flush it, and move it there.

    Lightning's own writer moves it from the folder for temporary files, by copying where that lies on another file
    system: a full disk or a kill then leaves half a file in place of the last good one.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint."""
        if "://" in str(path):  # not a file of this machine
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)

        def write(partial: Path) -> None:
            with partial.open(
                "wb"
            ) as file:  # a file, not its name: torch then raises OSError where the disk is full
                torch.save(checkpoint, file)

        write_whole(path, write)


def read_checkpoint(path: Path, trust_code: bool = False) -> dict[str, Any]:
    """Return a checkpoint: tensors, numbers, texts and containers of them.

    Args:
        path: of the file.
        trust_code: whether it may hold other objects, which run code when they are read.

    Raises:
        ValueError: if the file is damaged, or holds other objects.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust_code)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and numbers, which can run code when it is read, or is damaged; if you "
            f"trust whoever wrote it, add trust_code=true ({_reason(error)})"
        ) from error
    except (EOFError, RuntimeError, KeyError) as error:
        raise ValueError(f"{path} is damaged and cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
