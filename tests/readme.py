"""The code blocks of the README."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_with(words: str) -> str:
    """Return the one Python block of the README that holds some words."""
    blocks = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if words in block]
    assert len(blocks) == 1, f"one block of the README holds {words!r}"
    return blocks[0]
