"""The adapters on one base model, and which of them edit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...suggest import did_you_mean
from ..plain import finite
from ..saving import BESIDE
from .adapter import Adapter
from .calls import Choice
from .config import ReftConfig

DEFAULT = "default"  # the adapter that a model is built with
BASE = "__base__"  # in adapter_names, a row that no adapter edits


class AdapterSet(nn.ModuleDict):
    """Name -> adapter, in the order they were added.

    Attributes:
        active: the adapters that edit in calls without ``adapter_names``, in order.
        summed: whether their edits are summed rather than applied in sequence.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active: tuple[Choice, ...] = (Choice(DEFAULT),)
        self.summed = False

    @property
    def first(self) -> Any:  # an Adapter
        """The adapter that was added first."""
        return next(iter(self.values()))

    @property
    def whole(self) -> dict[str, Any]:
        """The adapters with their own parameters, without partitions."""
        adapters: dict[str, Any] = dict(self.items())
        partitions = {name for adapter in adapters.values() for name in adapter.partitions}
        return {name: adapter for name, adapter in adapters.items() if name not in partitions}

    def used_by(self, choices: Iterable[Choice]) -> list[Any]:  # of Adapter
        """Return the adapters of some choices, without duplicates."""
        return [self[name] for name in dict.fromkeys(choice.adapter for choice in choices)]

    def check_known(self, names: Iterable[Any]) -> None:
        """Reject a name that no adapter has."""
        for name in names:
            if name not in self:
                raise ValueError(
                    f"there is no adapter {name!r}; there are {', '.join(self)}{did_you_mean(str(name), self)}"
                )

    def check_new(self, adapters: Mapping[str, ReftConfig | None]) -> None:
        """Reject a name that is taken or invalid, and an adapter (None: a partition) that cannot share the model."""
        for name, config in adapters.items():
            if name in self:
                raise ValueError(f"the name {name!r} is taken; there are {', '.join(self)}")
            if name in (BASE, BESIDE) or not re.fullmatch(r"[\w-]+", str(name)) or hasattr(self, name):
                raise ValueError(
                    f"an adapter cannot be named {name!r}: use letters, digits, '-' and '_', and no name that torch or "
                    "a saved folder already uses"
                )
            if self.first.config.heads or (config is not None and config.heads):
                raise ValueError(
                    "an adapter with trained heads cannot share its base model, which has only one head: attach it to "
                    "a base model of its own, or without its head (heads=False)"
                )

    def choose(self, adapters: str | Sequence[str] | Mapping[str, float] | None) -> None:
        """Set the active adapters; see :meth:`ReftModel.set_adapter`."""
        given = [adapters] if isinstance(adapters, str) else adapters or []
        names = list(given)
        self.check_known(names)
        if len(set(names)) < len(names):
            raise ValueError(f"each adapter can be named only once; got {names}")
        weights = given if isinstance(given, Mapping) else dict.fromkeys(names, 1.0)
        choices = tuple(
            Choice(name, finite(f"the weight of the adapter {name!r}", weights[name])) for name in names
        )
        self._make_active(choices, isinstance(given, Mapping))

    def remove(self, name: str) -> None:
        """Remove an adapter; see :meth:`ReftModel.delete_adapter`."""
        self.check_known([name])
        adapters: dict[str, Any] = dict(self.items())
        if partitions := adapters[name].partitions:
            raise ValueError(f"{name!r} has partitions, delete them first: {', '.join(partitions)}")
        if len(adapters) == 1:
            raise ValueError(f"{name!r} is the only adapter: use detach() to remove everything")
        self.leave_out(name)
        del self[name]
        for adapter in adapters.values():
            adapter.partitions.pop(name, None)

    def leave_out(self, name: str) -> None:
        """Deactivate an adapter; see :meth:`ReftModel.disable_adapter`."""
        self.check_known([name])
        self._make_active(tuple(c for c in self.active if c.adapter != name), self.summed)

    def _make_active(self, choices: tuple[Choice, ...], summed: bool) -> None:
        if self.first.config.heads and not choices:
            raise ValueError(
                "the trained heads are part of the base model: disabled() runs it without them, detach() removes them"
            )
        self.active, self.summed = choices, summed

    def chosen_by(self, adapter_names: Sequence[Any] | None, rows: int) -> tuple[tuple[Choice, ...], bool]:
        """Return the adapters for a call with ``rows`` rows, and whether to sum them; see :meth:`ReftModel.forward`."""
        if adapter_names is None:
            return self.active, self.summed
        if isinstance(adapter_names, str) or len(adapter_names) != rows:
            raise ValueError(
                f"adapter_names needs one name for each of the {rows} rows, or None for the base; got {adapter_names!r}"
            )
        if self.first.config.heads:
            raise ValueError("adapter_names cannot choose trained heads, which all rows share")
        masks: dict[tuple[str, float], Tensor] = {}
        for row, entry in enumerate(adapter_names):
            name, weight = entry if isinstance(entry, tuple) else (entry, 1.0)
            if name is not None and name != BASE:
                self.check_known([name])
                key = (name, finite(f"the weight of the adapter {name!r}", weight))
                masks.setdefault(key, torch.zeros(rows, dtype=torch.bool))[row] = True
        return tuple(Choice(name, weight, mask) for (name, weight), mask in masks.items()), False


def partitions_of(adapter: Adapter) -> dict[str, Adapter]:
    """Return the partitions that an adapter was saved with."""
    adapter.partitions = dict(adapter.config.partitions)
    return {name: adapter.partition(rows) for name, rows in adapter.partitions.items()}
