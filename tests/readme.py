"""The pages that users read: README and docs, and the blocks of code in them."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
README = TEXTS["README.md"]
PAGES = "\n".join(TEXTS.values())

FENCE = re.compile(
    r"(?:<!-- not run: (?P<why>.+?) -->\n)?^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```", re.M | re.S
)
TITLE = re.compile(r"(?:# @package \w+\n)?# ([\w/.-]+\.(?:py|yaml|csv|jsonl))\n")


@dataclass(frozen=True)
class Block:
    """A fence: where it is, its language, and why it is not run, if it is not."""

    page: str
    language: str
    text: str
    why_not: str | None

    @property
    def file(self) -> str | None:
        """The name in its first line, where it shows a file: `# colours.py`."""
        found = TITLE.match(self.text)
        return found and found[1]


BLOCKS = [
    Block(page, found["language"], found["text"], found["why"])
    for page, text in TEXTS.items()
    for found in FENCE.finditer(text)
]


def blocks_of(page: str, language: str) -> list[Block]:
    """Return the blocks of a page that are run."""
    return [b for b in BLOCKS if (b.page, b.language, b.why_not) == (page, language, None)]


def pages_with(language: str) -> list[str]:
    """Return the pages that hold such a block."""
    return [page for page in TEXTS if blocks_of(page, language)]


def code_with(words: str) -> str:
    """Return the one Python block of the pages that holds some words."""
    found = [b.text for b in BLOCKS if b.language == "python" and b.why_not is None and words in b.text]
    assert len(found) == 1, f"one block of README and docs holds {words!r}"
    return found[0]


def command_lines() -> list[tuple[str, str]]:
    """Return (page, command line) of every bash block, each line once; one that ends in \\ goes on in the next."""
    lines = [
        (block.page, line.partition(" #")[0].strip())
        for block in BLOCKS
        if block.language == "bash" and block.why_not is None
        for line in block.text.replace("\\\n", " ").splitlines()
    ]
    first: dict[str, str] = {}
    for page, line in lines:
        if line and not line.startswith("#"):
            first.setdefault(line, page)
    return [(page, line) for line, page in first.items()]
