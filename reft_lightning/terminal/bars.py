"""Progress of long work: on a terminal a bar with what is done and the time left, elsewhere a log line now and then.

Bars are drawn on standard error, below other output, and vanish when their work is done. Only the first of several
processes of a run shows progress.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from .ranks import is_first_process

log = logging.getLogger(__name__)

PERIOD = 30.0  # seconds between two log lines if there is no terminal
DELAY = 1.0  # seconds that nested work must take before its bar is drawn

_display: Any = None  # rich's display of all open bars, as it cannot draw two at a time


def on_terminal() -> bool:
    """Whether bars can be drawn: standard error is a terminal, and not a dumb one."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


@contextmanager
def library_bars(
    drawn: bool, hide: Callable[[], None], show: Callable[[], None], wanted: bool = True
) -> Iterator[None]:
    """Let a library draw its own bars inside the block only if ours are drawn and its bars are wanted.

    Args:
        drawn: whether the library currently draws its bars.
        hide: function that turns them off.
        show: function that turns them on again.
        wanted: False if one of our bars replaces them.
    """
    hidden = drawn and not (wanted and on_terminal() and is_first_process())
    if hidden:
        hide()
    try:
        yield
    finally:
        if hidden:
            show()


class Bar:
    """A progress bar as a context manager; it is drawn below the bars that are already open.

    Args:
        what: the work in a few words, such as ``"reading runs"``.
        total: number of parts to do; None if unknown.
        begun: number of parts done earlier, in resumed work; they are not used to estimate the time left.
    """

    def __init__(self, what: str, total: float | None = None, begun: float = 0.0) -> None:
        self.what, self.total, self.done, self._begun = what, total, begun, begun
        self._started = self._told = time.monotonic()
        self._task = _draw(what, total) if on_terminal() and is_first_process() else None

    def advance(self, share: float = 1.0) -> None:
        """Add to the number of parts done."""
        self.show(self.done + share)

    def show(self, done: float, note: str = "") -> None:
        """Show how many parts are done; a note, such as a loss, follows the bar."""
        self.done = done
        if self._task is not None:
            late = time.monotonic() - self._started > DELAY
            _display.update(self._task, completed=done, note=note, count=self._count(), visible=late or None)
        elif is_first_process() and time.monotonic() - self._told >= PERIOD:
            self._told = time.monotonic()
            log.info("%s: %s", self.what, ", ".join(filter(None, (self._count(), self._left(), note))))

    def _count(self) -> str:
        if self.total is None:
            return f"{self.done:g}" if self.done else ""
        if float(self.total).is_integer() and float(self.done).is_integer():
            return f"{self.done:.0f} of {self.total:.0f}"
        return f"{100 * self.done / self.total:.0f} %"

    def _left(self) -> str:
        passed = time.monotonic() - self._started
        new = self.done - self._begun
        if not self.total or not new:
            return f"{timedelta(seconds=round(passed))} so far"
        left = passed * max(self.total - self.done, 0) / new
        return f"about {timedelta(seconds=round(left))} left"

    def close(self) -> None:
        """Remove the bar."""
        global _display
        if self._task is not None:
            _display.remove_task(self._task)
            self._task = None
            if not _display.task_ids:
                _display.stop()
                _display = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _draw(what: str, total: float | None) -> Any:
    global _display
    if _display is None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.text import Text

        class Left(TimeRemainingColumn):
            def render(self, task: Any) -> Text:
                return Text("") if task.time_remaining is None else super().render(task).append(" left")

        _display = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(24), TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(), Left(), TextColumn("{task.fields[note]}", markup=False),
            # output to a pipe is not redirected
            console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty(),
            speed_estimate_period=600,  # batches can take minutes
        )  # fmt: skip
        _display.start()
    # a nested bar starts hidden, as nested work is often too short to be read
    return _display.add_task(what, total=total, note="", count="", visible=not _display.task_ids)
