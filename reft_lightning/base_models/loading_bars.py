"""The bars that transformers draws while it reads weights."""

from __future__ import annotations

from contextlib import AbstractContextManager

from transformers.utils import logging as transformers_logging

from ..terminal.bars import library_bars


def bars_of_transformers(wanted: bool = True) -> AbstractContextManager[None]:
    """Let transformers draw its bars inside the block where ours are drawn, see :func:`library_bars`."""
    return library_bars(
        transformers_logging.is_progress_bar_enabled(),
        transformers_logging.disable_progress_bar,
        transformers_logging.enable_progress_bar,
        wanted,
    )
