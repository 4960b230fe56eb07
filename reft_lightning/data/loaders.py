"""The loaders of a data module: train batches that a run can resume in, evaluation rows dealt to the ranks.

Letters: n rows, W ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from .sampling import EvaluationShare, TrainBatches


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's number and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def train_loader(
    rows: Dataset,  # n rows
    lengths: Sequence[int],  # n
    collate: Callable[[list], Any],
    *,
    batch_size: int,
    seed: int,
    group_by_length: bool,
    num_workers: int,
    targets: Sequence[int] | None = None,  # n
) -> StatefulDataLoader:
    """Return a loader whose state lets a run resume in the middle of an epoch."""
    rank, world_size = rank_and_world_size()
    batches = TrainBatches(lengths, batch_size, seed, group_by_length, rank, world_size, targets)
    with warnings.catch_warnings():
        # torchdata 0.11 calls torch.set_vital, which torch 2.13 deprecates
        warnings.filterwarnings("ignore", "'set_vital' is deprecated", UserWarning)
        return StatefulDataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
        )


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the tensors of a batch.

    Examples stay, as Lightning would try to rebuild each of them; so do the numbers of rows, which are read on the CPU.
    """
    return {
        name: value.to(device, non_blocking=True)
        if isinstance(value, torch.Tensor) and name != "rows"
        else value
        for name, value in batch.items()
    }


def evaluation_loader(
    rows: Dataset,  # n rows
    lengths: Sequence[int],  # n
    collate: Callable[[list], Any],
    *,
    batch_size: int,
    num_workers: int,
) -> DataLoader:
    """Return a loader of this rank's share of the rows, each read by one rank, once."""
    rank, world_size = rank_and_world_size()
    return DataLoader(
        rows,
        batch_size=batch_size,
        sampler=EvaluationShare(lengths, rank, world_size),
        collate_fn=collate,
        num_workers=num_workers,
    )
