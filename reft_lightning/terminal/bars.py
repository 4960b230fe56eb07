"""How far long work is: on a terminal a bar with what is done and how long is left, elsewhere a line now and then.

Bars stand on standard error, below what is printed meanwhile, and vanish when their work is done. Only the first of
several processes of a run shows any.
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

log = logging.getLogger(__name__)

PERIOD = 30.0  # seconds between two lines where no terminal is watched
DELAY = 1.0  # seconds that a part of other work must take before its bar is drawn
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # where a process finds which of several it is

_display: Any = None  # rich's, of all bars that are open: it cannot draw two at a time


def on_terminal() -> bool:
    """Whether bars can be drawn: standard error is a terminal, and not a dumb one."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def is_first_process() -> bool:
    """Whether this process is the first, or the only one, of a run."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


@contextmanager
def library_bars(
    drawn: bool, hide: Callable[[], None], show: Callable[[], None], wanted: bool = True
) -> Iterator[None]:
    """Let a library draw bars of its own inside the block only where ours are drawn, and if they are wanted.

    Args:
        drawn: whether the library draws them now.
        hide: keeps it from it.
        show: lets it again.
        wanted: False where a bar of ours stands for them.
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
    """A bar of one piece of work, as a context manager; it is drawn below those that are open already.

    Args:
        what: is done, in a few words: ``"reading runs"``.
        total: of the parts to do; None where nobody knows.
        begun: of them done before, where work goes on; they do not count for the time that is left.
    """

    def __init__(self, what: str, total: float | None = None, begun: float = 0.0) -> None:
        self.what, self.total, self.done, self._begun = what, total, begun, begun
        self._started = self._told = time.monotonic()
        self._task = _draw(what, total) if on_terminal() and is_first_process() else None

    def advance(self, share: float = 1.0) -> None:
        """Add parts that are done."""
        self.show(self.done + share)

    def show(self, done: float, note: str = "") -> None:
        """Show how many parts are done; the note stands after the bar, such as a loss."""
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
            # what is printed into a pipe stays there
            console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty(),
            speed_estimate_period=600,  # batches can take minutes
        )  # fmt: skip
        _display.start()
    # parts of other work are often too short to be read
    return _display.add_task(what, total=total, note="", count="", visible=not _display.task_ids)
