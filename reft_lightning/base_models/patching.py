"""Attributes that are replaced during one call: a compiled forward, a checkpoint function, blocks that are skipped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def replaced(attributes: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set attributes inside the block and restore them however it ends: the object's own, or its class's.

    Args:
        attributes: (object, name, value) triples.
    """
    with ExitStack() as restored:
        for owner, name, value in attributes:
            restored.callback(_restore, owner, name, name in vars(owner), vars(owner).get(name))
            setattr(owner, name, value)
        yield


def _restore(owner: Any, name: str, had: bool, value: Any) -> None:
    if had:
        setattr(owner, name, value)
    elif name in vars(owner):  # not if interrupted before it was set
        delattr(owner, name)
