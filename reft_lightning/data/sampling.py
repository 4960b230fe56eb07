"""In which order rows are read: batches of similar length for training, shares of each rank for evaluation.

Letters: n rows, B batch size of one rank, W ranks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Sampler

_MEGABATCH = 50  # global batches sorted together; like the quarter, as in transformers' LengthGroupedSampler


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's number and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class TrainBatches(Sampler[list[int]]):
    """Shuffled batches of row numbers, of similar length if wanted, dealt to the ranks.

    The order of an epoch depends only on (seed, epoch, W B). Each global batch of W B rows is dealt to
    the ranks in turn, so W processes with batch size B see in each step the rows that one process with batch
    size W B sees. Every rank gets the same number of batches. The last global batch may be smaller; if it has
    fewer rows than there are ranks it is filled from the start of the epoch's order.

    Length groups keep randomness: shuffle all rows, cut into megabatches (50 global batches, or a quarter of
    the rows if that is less, so that epochs have different batches), sort each by length, cut into batches,
    shuffle the batches.

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
        self.seed, self.epoch = seed, 0
        self.start = 0  # how many batches of the next epoch that is iterated over are left out

    @property
    def sampler(self) -> TrainBatches:
        """Where Lightning looks for `set_epoch`, which it calls before each epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

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
        rng = random.Random(f"{self.seed}-{0 if self.overfit else epoch}")
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

    def __iter__(self) -> Iterator[list[int]]:
        """Iterate over the epoch that is set when its first batch is asked for."""
        epoch, start, self.start = self.epoch, self.start, 0
        self.epoch += 1  # without Lightning no one sets it
        yield from self.batches(epoch)[start:]

    def order(self) -> dict[str, Any]:
        """Return what the order of an epoch depends on."""
        return {
            "seed": self.seed,
            "rows": len(self.lengths),
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "group_by_length": self.group_by_length,
        }


class TrainLoader(DataLoader[Any]):
    """A loader of :class:`TrainBatches` whose state is the epoch and how many of its batches training was given.

    So training resumes with the very next batch, whoever reads the rows: torchdata's loader keeps a state of each
    process that does, and another number of them cannot go on from it.
    """

    _state: dict[str, Any] | None = None
    _resumed = False

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Iterate over the epoch that is set when its first batch is asked for, what was given of it left out.

        Raises:
            ValueError: if data, seed, batch size or ranks differ from those of the restored state, so that no
                continuation inside the epoch is exact.
        """
        batches = cast(TrainBatches, self.batch_sampler)
        position = 0
        # an epoch that trainer.limit_train_batches ended has batches left, and the next one has begun
        if self._resumed and self._state and self._state["epoch"] == batches.epoch:
            self._check_order(self._state, batches.order())
            position = self._state["position"]
        self._resumed, batches.start = False, position
        state = self._state = self._at(position)
        for batch in super().__iter__():
            state["position"] += 1
            yield batch

    def _at(self, position: int) -> dict[str, Any]:
        batches = cast(TrainBatches, self.batch_sampler)
        place = {"epoch": batches.epoch, "position": position, "batches": len(batches)}
        return place | batches.order()

    def state_dict(self) -> dict[str, Any]:
        """Return epoch and position, and what the order depends on."""
        return dict(self._state or self._at(0))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state was saved; after the last batch of an epoch, with the next epoch."""
        self._state, self._resumed = dict(state), True
        ended = state["position"] >= state["batches"]
        cast(TrainBatches, self.batch_sampler).set_epoch(state["epoch"] + ended)

    @staticmethod
    def _check_order(then: dict[str, Any], now: dict[str, Any]) -> None:
        # not in load_state_dict: Lightning's teardown would hide an error raised before the first batch
        for name, value in now.items():
            if then[name] != value:
                raise ValueError(
                    f"cannot resume inside an epoch: {name} was {then[name]} in the checkpoint and is {value} now; "
                    "restore it, or start a new run from the saved adapter"
                )


def evaluation_share(lengths: Sequence[int], rank: int = 0, world_size: int = 1) -> list[int]:
    """Return the rows of this rank, longest first: every row is read by exactly one rank, once.

    Neighbours have similar lengths, so little is padded, and the largest batch comes first: memory that does
    not suffice shows at once.
    """
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])[rank::world_size]
