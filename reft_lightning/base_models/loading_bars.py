"""The progress bars that transformers shows while it loads weights."""

from __future__ import annotations

from contextlib import AbstractContextManager

from transformers.utils import logging as transformers_logging

from ..terminal.bars import library_bars


def bars_of_transformers(wanted: bool = True) -> AbstractContextManager[None]:
    """Show transformers' progress bars inside the block if ours are shown; see :func:`library_bars`."""
    return library_bars(
        transformers_logging.is_progress_bar_enabled(),
        transformers_logging.disable_progress_bar,
        transformers_logging.enable_progress_bar,
        wanted,
    )
