"""Log lines that appear above the bars."""

from __future__ import annotations

import logging
import sys


class LogHandler(logging.StreamHandler):
    """Write log lines to the current standard output or error, which an open bar replaces to print above itself.

    Args:
        stream: ``stdout`` or ``stderr``.
    """

    def __init__(self, stream: str = "stderr") -> None:
        super().__init__()
        self.where = stream

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        self.setStream(getattr(sys, self.where))
        super().emit(record)
