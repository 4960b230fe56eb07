"""Whether gradient checkpointing is on, or can be."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def checkpointable(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the modules for which Hugging Face can enable gradient checkpointing."""
    name = "gradient_checkpointing"
    return [module for module in modules if name in vars(module) or hasattr(type(module), name)]


def runs_blocks_again(model: nn.Module) -> bool:
    """Whether gradient checkpointing is on: the backward pass recomputes blocks after the forward call."""
    return any(module.gradient_checkpointing for module in checkpointable(model.modules()))
