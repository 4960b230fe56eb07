"""Key/value caches."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def holds_columns(cache: Any, width: int) -> bool:
    """Whether a cache holds the keys and values of every column, and of nothing else.

    Not so with sliding windows, linear attention and virtual tokens in front (prompt tuning, prefix tuning).
    """
    return isinstance(cache, DynamicCache) and all(
        type(layer) is DynamicLayer and layer.get_seq_length() == width for layer in cache.layers
    )
