"""Lines of text on a console."""

from __future__ import annotations

import sys

from rich.console import Console


def plain_console(width: int = 120) -> Console:
    """Return a console for tables, ``width`` columns wide in a pipe. Codes such as ``:100:`` are only text."""
    return Console(width=None if sys.stdout.isatty() else width, emoji=False)


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a line as it is: neither wrapped nor highlighted, and ``[bold]`` and ``:100:`` are only text."""
    console.print(text, style=style, soft_wrap=True, highlight=False, markup=False, emoji=False)
