"""The numbers of the paper's tables: ``conf/experiment/paper/paper.csv``, one line per number, in percent."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ...config.compose import config_dir

GROUP = "paper"  # folder in conf/experiment
AVERAGE = "average"
WIN_RATE = "win rate"  # a task that reft-judge scores, not the run


class Number(NamedTuple):
    """A printed number."""

    value: float  # percent
    deviation: float | None  # over seeds; None if the paper prints none
    task: str  # a task in `results.json`, `AVERAGE` or `WIN_RATE`
    measure: str  # of the task


@dataclass(frozen=True)
class Printed:
    """One row of a table in the paper."""

    experiment: str  # such as "paper/commonsense_llama_7b_loreft"
    table: int
    row: str  # such as "LLaMA-7B LoReFT"
    seeds: int  # number of seeds that the numbers are means over
    overrides: tuple[str, ...]  # added by the user to the experiment: the file that the authors trained on
    # the paper's name of a benchmark -> its number; the average is one of them
    numbers: dict[str, Number] = field(default_factory=dict)


def read_rows(path: Path | None = None) -> list[Printed]:
    """Return the rows of all tables, in the order of the tables, from ``paper.csv`` or another file."""
    rows: dict[str, Printed] = {}
    path = path or config_dir() / "experiment" / GROUP / "paper.csv"
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            row = Printed(
                experiment=f"{GROUP}/{line['experiment']}", table=int(line["table"]), row=line["row"],
                seeds=int(line["seeds"]), overrides=tuple(line["overrides"].split()),
            )  # fmt: skip
            row = rows.setdefault(row.experiment, row)
            deviation = float(line["deviation"]) if line["deviation"] else None
            row.numbers[line["benchmark"]] = Number(
                float(line["value"]), deviation, line["task"], line["measure"]
            )
    return sorted(rows.values(), key=lambda row: row.table)
