"""Attributes that are others during one call: a compiled forward pass, a checkpoint that keeps the plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(attributes: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set attributes inside the block and put back what was there: the object's own, or its class's.

    Args:
        attributes: object, name and value of each.
    """
    before: list[tuple[Any, str, bool, Any]] = []
    try:
        for owner, name, value in attributes:
            own = vars(owner)
            before.append((owner, name, name in own, own.get(name)))
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, had, value in reversed(before):
            if had:
                setattr(owner, name, value)
            else:
                delattr(owner, name)
