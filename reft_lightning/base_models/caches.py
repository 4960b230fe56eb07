"""Key/value caches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

# Up to transformers 5.23, the argument and the output were called past_key_values, in Mamba cache_params.
RENAMED = ("past_key_values", "cache_params")
CACHE = "cache" if any(field.name == "cache" for field in fields(BaseModelOutputWithPast)) else RENAMED[0]


def with_new_name(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call with the cache under the name that the base model reads."""
    old = RENAMED if CACHE == "cache" else ()
    given = [name for name in (CACHE, *old) if arguments.get(name) is not None]
    if len(given) > 1:
        raise ValueError(f"the cache is given twice, as {' and as '.join(given)}")
    renamed = {CACHE: arguments[given[0]]} if given else {}
    return {name: value for name, value in arguments.items() if name not in old} | renamed


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments of a call; None if there is none."""
    return next((arguments[name] for name in (CACHE, RENAMED[0]) if arguments.get(name) is not None), None)


def columns_in(cache: Any) -> Any:
    """Return the number of columns that a cache holds, a tensor for a static one; None if it holds a running state."""
    length_of = getattr(cache, "get_seq_length", None)
    try:
        return None if length_of is None else length_of()
    except ValueError:  # no layer has keys and values
        return None


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
