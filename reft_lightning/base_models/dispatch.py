"""A base that accelerate has spread over devices, or keeps on the CPU or on disk until it is used (``device_map``).

Hooks of accelerate bring inputs to the weights, or weights to the inputs. Such a model stays where it is: moved as a
whole, as a Trainer does with what it trains, it would be on one device, or have no weights to move.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn


def is_dispatched(model: nn.Module) -> bool:
    """Whether accelerate's hooks decide where the parts of a model are."""
    return "_hf_hook" in vars(model)


def keep_in_place(model: nn.Module) -> None:
    """Let ``.to(device)`` of a module that contains this one pass it by."""
    vars(model)["_apply"] = partial(_unmoved, model)


def _unmoved(model: nn.Module, *_: Any, **__: Any) -> nn.Module:
    return model


def let_move(model: nn.Module) -> None:
    """Undo :func:`keep_in_place`."""
    vars(model).pop("_apply", None)
