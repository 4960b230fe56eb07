"""Log lines: above the bars, and from only one of the processes of a run."""

from __future__ import annotations

import logging
import os
import sys

from .ranks import is_first_process

PRINTED = ("huggingface_hub", "datasets")  # by handlers of their own


class LogHandler(logging.StreamHandler):
    """Write log lines to the current standard output or error, which an open bar replaces to print above itself.

    :class:`RunLines` says which lines.

    Args:
        stream: ``stdout`` or ``stderr``.
    """

    def __init__(self, stream: str = "stderr") -> None:
        super().__init__()
        self.where = stream
        self.addFilter(RunLines())

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, unless its library prints it."""
        if not str(record.name).startswith(PRINTED):
            self.setStream(getattr(sys, self.where))
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Go on without output if whatever read it has ended, as ``| head`` does after a few lines."""
        if isinstance(sys.exception(), BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        else:
            super().handleError(record)


class RunLines(logging.Filter):
    """Keep the lines of the first process of a run, and only the errors of the others, which say the same.

    Each request to the hub is one more line, at the level INFO.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written."""
        if record.name.startswith("httpx") and record.levelno < logging.WARNING:
            return False
        return record.levelno >= logging.ERROR or is_first_process()
