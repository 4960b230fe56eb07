"""Lines of text on a console."""

from __future__ import annotations

from rich.console import Console


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a line as it is: neither wrapped nor highlighted, and ``[bold]`` and ``:100:`` are only text."""
    console.print(text, style=style, soft_wrap=True, highlight=False, markup=False, emoji=False)
