"""Suggestions for error messages, and imports that may fail: names from a configuration, optional extras."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import site
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

_trusted: ContextVar[bool] = ContextVar("trusted", default=True)


@contextmanager
def names_of_a_stranger(trusted: bool = False) -> Iterator[None]:
    """Import only from installed packages inside the block: its names come from files someone else may have written.

    Args:
        trusted: whether the user trusts whoever wrote them; any module may then be imported.
    """
    token = _trusted.set(trusted)
    try:
        yield
    finally:
        _trusted.reset(token)


def trusted() -> bool:
    """Whether names may be imported from any module."""
    return _trusted.get()


def did_you_mean(name: str, allowed: Iterable[str], prefix: str = "") -> str:
    """Return ``"; did you mean 'x'?"`` for the allowed name closest to ``name``, or an empty string.

    >>> did_you_mean("bolq", ["boolq", "piqa"])
    "; did you mean 'boolq'?"
    """
    names = [str(option) for option in allowed]
    close = difflib.get_close_matches(str(name), names, n=1) or [n for n in names if name and str(name) in n]
    return f"; did you mean {prefix + close[0]!r}?" if close else ""


def check_choice(name: str, value: Any, allowed: Collection[str]) -> None:
    """Reject a value that is not allowed; the error lists the allowed ones and suggests the closest.

    >>> check_choice("clip", "papr", ("paper", "floor"))
    Traceback (most recent call last):
    ...
    ValueError: clip must be one of paper, floor; got 'papr'; did you mean 'paper'?
    """
    if not isinstance(value, str) or value not in allowed:
        hint = did_you_mean(str(value), allowed)
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}{hint}")


def no_such_folder(folder: Path) -> str:
    """Return the error message for a folder that does not exist, suggesting the closest that does."""
    near = [str(path) for path in folder.parent.glob("*") if path.is_dir()]
    return f"{folder}: no such folder{did_you_mean(str(folder), near)}"


@contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """Import optional packages inside the block.

    Args:
        extra: the extra in ``pyproject.toml`` that installs them.
        what: the start of the message, saying what needs them.

    Raises:
        ValueError: if one is missing, with the command that installs it.

    >>> with needs_extra("report", "a report needs matplotlib"):
    ...     import no_such_package
    Traceback (most recent call last):
    ...
    ValueError: a report needs matplotlib (No module named 'no_such_package'): pip install 'reft_lightning[report]'
    """
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{what} ({error}): pip install 'reft_lightning[{extra}]'") from error


def import_object(path: str) -> Any:
    """Return the object that an import path such as ``torch.optim.AdamW`` names.

    Raises:
        ValueError: if there is no such module or name, suggesting the closest; inside :func:`names_of_a_stranger`,
            also if the module is outside the installed packages.

    >>> import_object("collections.OrderedDic")
    Traceback (most recent call last):
    ...
    ValueError: module collections has no 'OrderedDic'; did you mean 'OrderedDict'?
    """
    module_path, _, name = str(path).rpartition(".")
    if not module_path:
        raise ValueError(f"an import path must contain a dot, as in torch.optim.AdamW; got {path!r}")
    if not trusted() and not _is_installed(module_path.partition(".")[0]):
        raise ValueError(
            f"{path} is not part of an installed package, and importing it would run code; if you trust whoever wrote "
            "it, add trust_code=true"
        )
    try:
        module = importlib.import_module(module_path)
    except ImportError as error:
        raise ValueError(f"cannot import {module_path} for {path}: {error}") from error
    if not hasattr(module, name):
        raise ValueError(f"module {module_path} has no {name!r}{did_you_mean(name, dir(module))}")
    return getattr(module, name)


def _is_installed(package: str) -> bool:
    if package == __name__.partition(".")[0]:
        return True
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    if spec is None:
        return False
    places = [
        *site.getsitepackages(),
        site.getusersitepackages(),
        *map(sysconfig.get_path, ("purelib", "platlib")),
    ]
    files = [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    return bool(files) and all(any(Path(file).is_relative_to(place) for place in places) for file in files)
