"""Lines of text on a console."""

import io

from rich.console import Console

from reft_lightning.terminal.lines import say


def test_a_line_is_printed_as_it_is():
    text = "[bold]runs/a[/bold] \\[1] is longer than the console: 12.5 % of f1:100:x"
    file = io.StringIO()
    say(Console(file=file, width=20, force_terminal=True), text)
    assert file.getvalue() == f"{text}\n"
