"""Arguments as a saved configuration holds them: Python's numbers, strings, lists and dicts."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def finite(what: str, value: Any) -> float:
    """Return a number, neither NaN nor infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number; got {value!r}")
    return float(value)


def plain(name: str, value: Any) -> Any:
    """Return a JSON-serialisable value, so that the adapter can be saved after training.

    NumPy and torch numbers and arrays, paths, dtypes, tuples and dataclasses are converted: a tensor becomes a list of
    numbers.

    Raises:
        ValueError: if the value cannot be converted.

    >>> plain("rank", np.int64(2)), plain("layers", range(2)), plain("dtype", torch.bfloat16)
    (2, [0, 1], 'bfloat16')
    """
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if is_dataclass(value) and not isinstance(value, type):  # such as peft's LoftQConfig
        value = asdict(value)
    if isinstance(value, Mapping):
        return {plain(name, key): plain(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, Sequence | Set):
        return [plain(name, item) for item in value]
    raise ValueError(
        f"{name} cannot be saved with the adapter: give numbers, strings, or lists and dicts of them; got {value!r}"
    )
