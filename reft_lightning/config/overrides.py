"""Command-line arguments in Hydra's syntax: ``key=value``, ``+key=value``, ``~key``."""

from __future__ import annotations


def key_of(text: str) -> str:
    """Return the key of an override.

    >>> key_of("+callbacks.mine.rate=0.1")
    'callbacks.mine.rate'
    """
    return text.lstrip("+~").partition("=")[0]
