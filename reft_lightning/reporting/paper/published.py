"""What the paper's tables print, and which runs stand for it.

The printed numbers stand in the headers of `conf/experiment/paper/*.yaml`, the obtained ones in the `results.json`
of run folders; `results["experiment"]` joins the two. Numbers are percent.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...suggest import did_you_mean

log = logging.getLogger(__name__)

GROUP = "paper"  # of conf/experiment
AVERAGE = "average"
WIN_RATE = "win rate"

# How the paper prints a benchmark, without its punctuation -> task and measure of the results.
NAMES: dict[str, tuple[str, str]] = {
    "boolq": ("boolq", "accuracy"),
    "piqa": ("piqa", "accuracy"),
    "siqa": ("social_i_qa", "accuracy"),
    "hellas": ("hellaswag", "accuracy"),
    "hellaswag": ("hellaswag", "accuracy"),
    "winog": ("winogrande", "accuracy"),
    "winogrande": ("winogrande", "accuracy"),
    "arce": ("ARC-Easy", "accuracy"),
    "arcc": ("ARC-Challenge", "accuracy"),
    "obqa": ("openbookqa", "accuracy"),
    "aqua": ("AQuA", "accuracy"),
    "gsm8k": ("gsm8k", "accuracy"),
    "mawps": ("mawps", "accuracy"),
    "svamp": ("SVAMP", "accuracy"),
    "mnli": ("mnli", "accuracy"),
    "sst2": ("sst2", "accuracy"),
    "mrpc": ("mrpc", "accuracy"),
    "cola": ("cola", "matthews"),
    "qnli": ("qnli", "accuracy"),
    "qqp": ("qqp", "accuracy"),
    "rte": ("rte", "accuracy"),
    "stsb": ("stsb", "pearson"),
    "winrate": (WIN_RATE, ""),
}


@dataclass(frozen=True)
class Printed:
    """One row of a table of the paper, from the header of its experiment file.

    Args:
        experiment: `"paper/commonsense_llama_7b_loreft"`.
        table: `"1"`.
        row: `"LLaMA-7B LoReFT"`.
        numbers: the paper's name of a benchmark -> (percent, standard deviation or None); the average is one too.
        seeds: over how many; None where the header does not say.
        command: the overrides of the header's command beside the experiment.
    """

    experiment: str
    table: str
    row: str
    numbers: Mapping[str, tuple[float, float | None]]
    seeds: int | None
    command: tuple[str, ...] = ()


def read_rows(folder: Path) -> list[Printed]:
    """Return the rows of all experiment files that carry numbers, by table."""
    rows = [read_row(path) for path in sorted(folder.glob("*.yaml"))]
    return sorted((row for row in rows if row.numbers), key=lambda row: order(row.table))


def read_row(path: Path) -> Printed:
    """Return what the header of one experiment file says.

    Raises:
        ValueError: if it lacks a line, or a number or name cannot be read; names the file.
    """
    said = header(path.read_text(encoding="utf-8"))
    for key in ("Command", "Table", "Expected"):
        if key not in said:
            raise ValueError(f"{path}: the header has no line '# {key}:'")
    table, _, rest = said["Table"].partition(",")
    row = re.search(r"\brow (.+?)(?: \([\d.]+ %|, mean of|$)", rest)
    seeds = re.search(r"mean of (\d+) seeds", said["Table"])
    numbers = {} if said["Expected"].startswith("no published") else _numbers(said["Expected"], path)
    if numbers and "Average" in said:
        numbers |= _numbers(f"{AVERAGE} {said['Average']}", path)
    return Printed(
        experiment=f"{GROUP}/{path.stem}",
        table=table.strip(),
        row=row.group(1) if row else path.stem,
        numbers=numbers,
        seeds=int(seeds.group(1)) if seeds else None,
        command=_overrides(said["Command"]),
    )


def _overrides(command: str) -> tuple[str, ...]:
    """Return what `reft-train experiment=NAME ...` has beside the experiment and the seeds."""
    arguments = re.split(r"\breft-(?!train)", command)[0].split()[1:]
    return tuple(x for x in arguments if "=" in x and not x.startswith(("experiment=", "seed=")))


def header(text: str) -> dict[str, str]:
    """Return key -> value of the comment lines on top of a file; a deeper indented line continues the value."""
    said: dict[str, str] = {}
    key = None
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        found = re.match(r"# ([A-Z]\w+): +(.+)", line)
        if found:
            key = found.group(1)
            said[key] = found.group(2).strip()
        elif key and re.match(r"#  +\S", line):
            said[key] += f" {line[1:].strip()}"
        else:
            key = None  # an empty line ends the keys' values
    return said


def _numbers(text: str, path: Path) -> dict[str, tuple[float, float | None]]:
    numbers: dict[str, tuple[float, float | None]] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\S.*?) (\d+(?:\.\d+)?)(?: \((\d*\.?\d+)\))?\s*", part)
        if not found:
            raise ValueError(
                f"{path}: 'NAME number' or 'NAME number (SD)' cannot be read from {part.strip()!r}"
            )
        name, value, deviation = found.groups()
        if name != AVERAGE and plain(name) not in NAMES:
            hint = did_you_mean(plain(name), NAMES)
            raise ValueError(f"{path}: no benchmark is known as {name!r}{hint}; known: {', '.join(NAMES)}")
        numbers[name] = (float(value), float(deviation) if deviation else None)
    return numbers


def plain(name: str) -> str:
    """Return a name in lower case without punctuation.

    >>> plain("SST-2")
    'sst2'
    """
    return re.sub(r"[^a-z0-9]", "", name.lower())


def order(table: str) -> tuple[int, str]:
    """Return what tables are sorted by: their number."""
    digits = re.match(r"\d+", table)
    return (int(digits.group()) if digits else 0, table)
