"""In which order rows are read: batches of similar length for training, shares of each rank for evaluation.

Letters: n rows, B batch size of one rank, W ranks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

_MEGABATCH = 50  # global batches sorted together; like the quarter, as in transformers' LengthGroupedSampler


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's number and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class EpochOrder:
    """The seed and the epoch of an order; Lightning calls `set_epoch` on it before each epoch."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch


class TrainBatches(Sampler[list[int]]):
    """Shuffled batches of row numbers, of similar length if wanted, dealt to the ranks.

    The order of an epoch depends only on (seed, epoch, W B). Each global batch of W B rows is dealt to
    the ranks in turn, so W processes with batch size B see in each step the rows that one process with batch
    size W B sees. Every rank gets the same number of batches. The last global batch may be smaller; if it has
    fewer rows than there are ranks it is filled from the start of the epoch's order.

    Length groups keep randomness: shuffle all rows, cut into megabatches (50 global batches, or a quarter of
    the rows if that is less, so that epochs have different batches), sort each by length, cut into batches,
    shuffle the batches.

    The `state_dict` of an iterator is its epoch and position. `StatefulDataLoader` saves it, and training resumes
    with the very next batch.

    Args:
        lengths: tokens of each row.
        batch_size: B.
        seed: of the run.
        group_by_length: whether batches hold rows of similar length.
        rank: of this process.
        world_size: W.
        targets: of each row: what its loss is a mean over, tokens or one label; None: one each.
        overfit: every epoch has the batches of the first, as ``trainer.overfit_batches`` promises.

    Raises:
        ValueError: if there are no rows, or the batch size is not positive.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        group_by_length: bool = True,
        rank: int = 0,
        world_size: int = 1,
        targets: Sequence[int] | None = None,
        overfit: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more; got {batch_size}")
        if not lengths:
            raise ValueError("there are no train rows")
        self.lengths, self.batch_size, self.group_by_length = list(lengths), batch_size, group_by_length
        self.rank, self.world_size, self.overfit = rank, world_size, overfit
        self.targets = [1] * len(lengths) if targets is None else list(targets)
        self._counted: tuple[int, list[tuple[int, int]]] = (-1, [])  # of the last epoch asked for
        self.sampler = EpochOrder(seed)  # where Lightning looks for set_epoch

    def __len__(self) -> int:
        """Return the number of batches of an epoch, the same on every rank."""
        return -(-len(self.lengths) // (self.batch_size * self.world_size))

    def batches(self, epoch: int) -> list[list[int]]:
        """Return this rank's batches of an epoch."""
        return [group[self.rank :: self.world_size] for group in self._groups(epoch)[0]]

    def targets_of(self, epoch: int) -> list[tuple[int, int]]:
        """Return how many targets each batch of an epoch has on this rank, and on all ranks together.

        Rows that only fill up the last batch count as none: they have been read.
        """
        if self._counted[0] != epoch:  # asked for at every batch
            groups, spare = self._groups(epoch)
            counts = [[self.targets[i] for i in group] for group in groups]
            counts[-1][len(counts[-1]) - spare :] = [0] * spare
            self._counted = epoch, [(sum(c[self.rank :: self.world_size]), sum(c)) for c in counts]
        return self._counted[1]

    def _groups(self, epoch: int) -> tuple[list[list[int]], int]:
        """Return the global batches of an epoch, and how many rows fill up the last one."""
        rng = random.Random(f"{self.sampler.seed}-{0 if self.overfit else epoch}")
        size = self.batch_size * self.world_size
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        missing = max(self.world_size - (len(order) % size or size), 0)
        spare = (order * (missing // len(order) + 1))[:missing]
        full, rest = order[: len(order) // size * size], order[len(order) // size * size :] + spare
        if self.group_by_length:
            mega = size * max(min(len(full) // (4 * size), _MEGABATCH), 1)
            full = [
                i
                for start in range(0, len(full), mega)
                for i in sorted(full[start : start + mega], key=lambda i: -self.lengths[i])
            ]
        groups = [full[start : start + size] for start in range(0, len(full), size)]
        if self.group_by_length:
            rng.shuffle(groups)
        if rest:
            groups.append(rest)
        return groups, len(spare)

    def __iter__(self) -> TrainIterator:
        """Return an iterator over the epoch that is set when its first batch is asked for."""
        return TrainIterator(self)


class TrainIterator(Iterator[list[int]]):
    """A position in an epoch's batches that can be saved and restored."""

    def __init__(self, owner: TrainBatches) -> None:
        self._owner = owner
        self._position = 0
        self._epoch: int | None = None  # unknown until the first batch: set_epoch comes after iter()
        self._batches: list[list[int]] = []
        self._resumed: dict[str, Any] = {}

    def __next__(self) -> list[int]:
        """Return the next batch of row numbers.

        Raises:
            ValueError: if data, seed, batch size or ranks differ from those of the restored state, so that no
                continuation inside the epoch is exact.
        """
        if not self._batches:
            self._check_resumed()
            if self._epoch is None:
                self._epoch = self._owner.sampler.epoch
            self._batches = self._owner.batches(self._epoch)
            # without Lightning no one sets the epoch: the next iterator continues with the next one
            self._owner.sampler.set_epoch(self._epoch + 1)
        if self._position >= len(self._batches):
            raise StopIteration
        self._position += 1
        return self._batches[self._position - 1]

    def state_dict(self) -> dict[str, Any]:
        """Return epoch and position, and what the order depends on."""
        epoch = self._owner.sampler.epoch if self._epoch is None else self._epoch
        batches = len(self._owner)
        return {"epoch": epoch, "position": self._position, "batches": batches, **self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state was saved; after the last batch of an epoch, with the next epoch."""
        self._epoch, self._position = state["epoch"], state["position"]
        if self._position >= state["batches"]:
            self._epoch, self._position = state["epoch"] + 1, 0
        else:
            self._resumed = state
        assert self._epoch is not None
        self._owner.sampler.set_epoch(self._epoch)

    def _check_resumed(self) -> None:
        # not in load_state_dict: Lightning's teardown would hide an error raised before the first batch
        for name, now in self._order().items():
            before = self._resumed.get(name, now)
            if before != now:
                raise ValueError(
                    f"cannot resume inside an epoch: {name} was {before} in the checkpoint and is {now} now; "
                    "restore it, or start a new run from the saved adapter"
                )

    def _order(self) -> dict[str, Any]:
        owner = self._owner
        return {
            "seed": owner.sampler.seed,
            "rows": len(owner.lengths),
            "batch_size": owner.batch_size,
            "world_size": owner.world_size,
            "group_by_length": owner.group_by_length,
        }


class EvaluationShare(Sampler[int]):
    """This rank's share of the rows, longest first: every row is read by exactly one rank, once.

    Neighbours have similar lengths, so little is padded, and the largest batch comes first: memory that does
    not suffice shows at once.

    Args:
        lengths: tokens of each row.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(self, lengths: Sequence[int], rank: int = 0, world_size: int = 1) -> None:
        self.order = sorted(range(len(lengths)), key=lambda i: -lengths[i])[rank::world_size]

    def __len__(self) -> int:
        """Return the number of rows of this rank."""
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        """Iterate over row numbers."""
        return iter(self.order)
