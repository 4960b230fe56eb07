"""Key/value caches."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def holds_columns(cache: Any, width: int) -> bool:
    """Whether a cache holds the keys and values of every column, and nothing else.

    Sliding windows and linear attention hold fewer; prompt tuning and prefix tuning put virtual tokens in front.
    """
    return isinstance(cache, DynamicCache) and all(
        type(layer) is DynamicLayer and layer.get_seq_length() == width for layer in cache.layers
    )
