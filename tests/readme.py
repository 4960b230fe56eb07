"""The code blocks of the README."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = README + "".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md")))


def code_with(words: str) -> str:
    """Return the one Python block of the README that holds some words."""
    blocks = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if words in block]
    assert len(blocks) == 1, f"one block of the README holds {words!r}"
    return blocks[0]


def commands_of(name: str) -> list[str]:
    """Return the arguments of every command of this name in the README and the docs."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGES, re.DOTALL)
    joined = [block.replace("\\\n", " ") for block in blocks]
    lines = [line.partition(" #")[0] for block in joined for line in block.splitlines()]
    return [line.removeprefix(name).strip() for line in lines if line.startswith(f"{name} ")]
