"""The progress bars that transformers shows while it loads weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partialmethod
from typing import Any

from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from ..terminal.bars import library_bars

_before: list[Any] = []


def bars_of_transformers(wanted: bool = True) -> AbstractContextManager[None]:
    """Show transformers' progress bars inside the block if ours are shown; see :func:`library_bars`."""
    return library_bars(transformers_logging.is_progress_bar_enabled(), _hide, _show, wanted)


def _hide() -> None:
    transformers_logging.disable_progress_bar()
    # GGUF files are read with a plain bar of tqdm
    _before.append(tqdm.__init__)  # may be the user's
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)  # pyright: ignore[reportAttributeAccessIssue]


def _show() -> None:
    transformers_logging.enable_progress_bar()
    tqdm.__init__ = _before.pop()
