"""The one "did you mean" of error messages, for names and for import paths."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


def did_you_mean(name: str, allowed: Iterable[str], prefix: str = "") -> str:
    """Return ``"; did you mean 'x'?"`` for the allowed name closest to ``name``, or an empty text.

    >>> did_you_mean("bolq", ["boolq", "piqa"])
    "; did you mean 'boolq'?"
    """
    names = [str(option) for option in allowed]
    close = difflib.get_close_matches(str(name), names, n=1) or [n for n in names if name and str(name) in n]
    return f"; did you mean {prefix + close[0]!r}?" if close else ""


def import_object(path: str) -> Any:
    """Return what an import path such as ``torch.optim.AdamW`` names.

    Raises:
        ValueError: if there is no such module or name; names the nearest.

    >>> import_object("collections.OrderedDic")
    Traceback (most recent call last):
    ...
    ValueError: module collections has no 'OrderedDic'; did you mean 'OrderedDict'?
    """
    module_path, _, name = str(path).rpartition(".")
    if not module_path:
        raise ValueError(f"an import path has a dot, as in torch.optim.AdamW; got {path!r}")
    try:
        module = importlib.import_module(module_path)
    except ImportError as error:
        raise ValueError(f"cannot import {module_path}, of {path}: {error}") from error
    if not hasattr(module, name):
        raise ValueError(f"module {module_path} has no {name!r}{did_you_mean(name, dir(module))}")
    return getattr(module, name)
