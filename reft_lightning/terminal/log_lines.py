"""Log lines: above the bars, and from only one of the processes of a run."""

from __future__ import annotations

import logging
import sys

from .ranks import is_first_process


class LogHandler(logging.StreamHandler):
    """Write log lines to the current standard output or error, which an open bar replaces to print above itself.

    Of the processes of a run, only the first writes all lines; see :class:`FirstProcess`.

    Args:
        stream: ``stdout`` or ``stderr``.
    """

    def __init__(self, stream: str = "stderr") -> None:
        super().__init__()
        self.where = stream
        self.addFilter(FirstProcess())

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        self.setStream(getattr(sys, self.where))
        super().emit(record)


class FirstProcess(logging.Filter):
    """Keep the lines of the first process of a run, and only the errors of the others, which say the same."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written."""
        return record.levelno >= logging.ERROR or is_first_process()
