"""Key/value caches."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def states_in(config: PretrainedConfig) -> int:
    """Return the number of layers that keep a running state instead of keys and values (Mamba, linear attention)."""
    return sum(not isinstance(layer, DynamicLayer) for layer in DynamicCache(config=config).layers)


def window_of(config: PretrainedConfig) -> int | None:
    """Return the number of columns in the sliding windows of a model's layers; None without sliding windows."""
    layers = DynamicCache(config=config).layers
    return next((x.sliding_window for x in layers if isinstance(x, DynamicSlidingWindowLayer)), None)


def holds_columns(cache: Any, width: int) -> bool:
    """Whether a cache holds exactly the keys and values of every column.

    Sliding windows and linear attention hold fewer; prompt tuning and prefix tuning add virtual tokens in front.
    """
    return isinstance(cache, DynamicCache) and all(
        type(layer) is DynamicLayer and layer.get_seq_length() == width for layer in cache.layers
    )
