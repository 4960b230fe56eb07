"""Attributes of modules that are others during one call: a compiled forward pass, a checkpoint that keeps the plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced(attributes: Iterable[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """Set attributes inside the block and put back what was there: the object's own, or its class's.

    Args:
        attributes: module, name and value of each.
    """
    before: list[tuple[nn.Module, str, bool, Any]] = []
    try:
        for module, name, value in attributes:
            own = vars(module)
            before.append((module, name, name in own, own.get(name)))
            setattr(module, name, value)
        yield
    finally:
        for module, name, had, value in reversed(before):
            if had:
                setattr(module, name, value)
            else:
                delattr(module, name)


def checkpointable(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the modules for which gradient checkpointing can be switched on, as Hugging Face does it."""
    name = "gradient_checkpointing"
    return [module for module in modules if name in vars(module) or hasattr(type(module), name)]


def runs_blocks_again(model: nn.Module) -> bool:
    """Whether gradient checkpointing is on in a model: the backward pass runs blocks again, after the call."""
    return any(module.gradient_checkpointing for module in checkpointable(model.modules()))
