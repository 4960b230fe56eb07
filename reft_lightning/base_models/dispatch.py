"""A base that accelerate has spread across devices, or keeps on the CPU or on disk until it is used (``device_map``).

Accelerate's hooks move inputs to the weights, or weights to the inputs. Such a model must stay in place: if it were
moved as a whole, as a Trainer moves its model, it would be on a single device, or have no weights to move.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn


def is_dispatched(model: nn.Module) -> bool:
    """Whether accelerate's hooks decide where the parts of a model are."""
    return "_hf_hook" in vars(model)


def keep_in_place(model: nn.Module) -> None:
    """Exclude a model from ``.to(device)`` of a module that contains it."""
    vars(model)["_apply"] = partial(_unmoved, model)


def _unmoved(model: nn.Module, *_: Any, **__: Any) -> nn.Module:
    return model


def let_move(model: nn.Module) -> None:
    """Undo :func:`keep_in_place`."""
    vars(model).pop("_apply", None)
