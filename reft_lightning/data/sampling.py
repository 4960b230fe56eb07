"""The order in which rows are read: batches of similar length for training, one share per rank for evaluation.

Letters: n rows, B batch size of one rank, W ranks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Sampler

# global batches sorted together; this number and the quarter are those of transformers' LengthGroupedSampler
_MEGABATCH = 50


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class TrainBatches(Sampler[list[int]]):
    """Shuffled batches of row indices, optionally of similar length, split across ranks.

    The order of an epoch depends only on (seed, epoch, W B). The rows of each global batch of W B rows are dealt to
    the ranks in turn, so in each step W processes with batch size B see the same rows as one process with batch size
    W B. Every rank gets the same number of batches. The last global batch may be smaller; if it has fewer rows than
    there are ranks, it is filled up from the start of the epoch's order.

    Grouping by length preserves randomness: shuffle all rows, cut them into megabatches (50 global batches, or a
    quarter of the rows if that is less, so that epochs have different batches), sort each by length, cut it into
    batches, and shuffle the batches.

    Args:
        lengths: number of tokens in each row.
        batch_size: B.
        seed: the run's seed.
        group_by_length: whether batches hold rows of similar length.
        rank: rank of this process.
        world_size: W.
        targets: number of targets of each row, over which its loss is averaged (tokens, or one label); None: one each.
        overfit: whether every epoch repeats the batches of the first, as with ``trainer.overfit_batches``.

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
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        if not lengths:
            raise ValueError("there are no train rows")
        self.lengths, self.batch_size, self.group_by_length = list(lengths), batch_size, group_by_length
        self.rank, self.world_size, self.overfit = rank, world_size, overfit
        self.targets = [1] * len(lengths) if targets is None else list(targets)
        self._counted: tuple[int, list[tuple[int, int]]] = (-1, [])  # cache of `targets_of`: epoch, counts
        self.seed, self.epoch = seed, 0
        self.start = 0  # number of batches to skip in the next iteration

    @property
    def sampler(self) -> TrainBatches:
        """Return this object; Lightning looks here for `set_epoch`, which it calls before each epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches per epoch, which is the same on every rank."""
        return -(-len(self.lengths) // (self.batch_size * self.world_size))

    def batches(self, epoch: int) -> list[list[int]]:
        """Return this rank's batches of an epoch."""
        return [group[self.rank :: self.world_size] for group in self._groups(epoch)[0]]

    def targets_of(self, epoch: int) -> list[tuple[int, int]]:
        """Return the number of targets of each batch of an epoch, on this rank and over all ranks.

        Rows that fill up the last batch do not count, because they are repeated.
        """
        if self._counted[0] != epoch:  # called for every batch
            groups, spare = self._groups(epoch)
            counts = [[self.targets[i] for i in group] for group in groups]
            counts[-1][len(counts[-1]) - spare :] = [0] * spare
            self._counted = epoch, [(sum(c[self.rank :: self.world_size]), sum(c)) for c in counts]
        return self._counted[1]

    def _groups(self, epoch: int) -> tuple[list[list[int]], int]:
        """Return the global batches of an epoch, and the number of rows that fill up the last one."""
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
        """Iterate over the epoch that is set when the first batch is requested."""
        epoch, start, self.start = self.epoch, self.start, 0
        self.epoch += 1  # without Lightning, nothing calls set_epoch
        yield from self.batches(epoch)[start:]

    def order(self) -> dict[str, Any]:
        """Return the settings that the order of an epoch depends on."""
        return {
            "seed": self.seed,
            "rows": len(self.lengths),
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "group_by_length": self.group_by_length,
        }


class TrainLoader(DataLoader[Any]):
    """A loader of :class:`TrainBatches` whose state is the epoch and the number of its batches consumed by training.

    Training therefore resumes with exactly the next batch, for any number of worker processes. torchdata's loader
    saves a state for each worker, so it cannot resume with a different number of them.
    """

    _state: dict[str, Any] | None = None
    _resumed = False

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Iterate over the epoch that is set when the first batch is requested, skipping batches already consumed.

        Raises:
            ValueError: if the data, seed, batch size or number of ranks differ from the restored state, so that the
                epoch cannot be continued exactly.
        """
        batches = cast(TrainBatches, self.batch_sampler)
        position = 0
        # an epoch ended by trainer.limit_train_batches has batches left, although the next epoch has begun
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
        """Return the epoch, the position in it, and the settings that its order depends on."""
        return dict(self._state or self._at(0))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; after the last batch of an epoch, continue with the next epoch."""
        self._state, self._resumed = dict(state), True
        ended = state["position"] >= state["batches"]
        cast(TrainBatches, self.batch_sampler).set_epoch(state["epoch"] + ended)

    @staticmethod
    def _check_order(then: dict[str, Any], now: dict[str, Any]) -> None:
        # not in load_state_dict, because Lightning's teardown would hide an error raised before the first batch
        for name, value in now.items():
            if then[name] != value:
                raise ValueError(
                    f"cannot resume within an epoch: {name} was {then[name]} in the checkpoint and is {value} now; "
                    "restore the old value, or start a new run from the saved adapter"
                )


def evaluation_share(lengths: Sequence[int], rank: int = 0, world_size: int = 1) -> list[int]:
    """Return the row indices of this rank, longest first; every row is read once, by exactly one rank.

    Neighbouring rows have similar lengths, which minimises padding. The largest batch comes first, so running out of
    memory shows immediately.
    """
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])[rank::world_size]
