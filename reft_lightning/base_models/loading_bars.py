"""The bars that transformers draws while it reads weights: on terminals only."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

from ..progress import is_first_process, on_terminal


@contextmanager
def bars_on_terminals(wanted: bool = True) -> Iterator[None]:
    """Let transformers draw its bars inside the block where standard error is a terminal, if they are wanted."""
    hidden = transformers_logging.is_progress_bar_enabled() and not (
        wanted and on_terminal() and is_first_process()
    )
    if hidden:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if hidden:
            transformers_logging.enable_progress_bar()
