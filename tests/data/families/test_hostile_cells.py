"""A cell of the wrong kind, in any column of any benchmark, is an error that names its row, never a traceback."""

import copy
from pathlib import Path

import pytest

from reft_lightning.data import FAMILIES
from reft_lightning.data.example import placed
from reft_lightning.data.rows import DataSource, read_rows

FIXTURES = Path(__file__).parents[2] / "fixtures"
FOLDERS = sorted(p for p in FIXTURES.rglob("*") if p.is_dir() and p.name in ("rendered", "original")) + [
    FIXTURES / name
    for name in ("code", "glue", "instruction", "reading", "arithmetic", "commonsense", "skills")
]
CELLS = [
    None,
    7,
    1.5,
    True,
    "",
    " ",
    "ü",
    "9",
    [],
    [None],
    [7],
    ["a"],
    [[]],
    [{}],
    {},
    {"text": None},
    b"\xff",
    b"a",
]


def first_rows():
    """(family, task, row) of each layout of each task that the fixtures have, without repetitions of columns."""
    found = {}
    for family in FAMILIES.values():
        for task in family.tasks.values():
            for folder in FOLDERS:
                for split in task.local:
                    try:
                        rows, _ = read_rows(task, split, DataSource("local", str(folder)))
                    except (FileNotFoundError, ValueError):
                        continue
                    row = rows[0][0]
                    found[family.name, task.name, tuple(row)] = (task, row)
    return found


ROWS = first_rows()


def test_every_family_has_rows_to_try():
    assert {family for family, _, _ in ROWS} == set(FAMILIES)


@pytest.mark.parametrize("key", ROWS, ids=lambda key: f"{key[1]} {' '.join(key[2])}"[:60])
def test_a_cell_of_the_wrong_kind_names_its_row(key):
    task, row = ROWS[key]
    refused = 0
    for name, inner in _places(row):
        for cell in CELLS:
            broken = copy.deepcopy(row)
            _put(broken, name, inner, cell)
            said, read = "", ""
            try:
                read = " ".join(placed(task.example, broken, "here, row 7").content)
            except ValueError as error:
                said = str(error)
                refused += 1
            assert read or "here, row 7" in said, (name, inner, cell)
            for rendered in ("None", "b'"):  # what Python writes for a value that is not text
                assert rendered not in read or rendered in str(row), (name, inner, cell)
    assert refused


def _places(row):
    """(column, key within it or None) of all cells, those in lists and objects too."""
    found = []
    for name, value in row.items():
        found.append((name, None))
        if isinstance(value, dict):
            found += [(name, key) for key in value]
        if isinstance(value, list) and value:
            found.append((name, 0))
    return found


def _put(row, name, inner, cell):
    if inner is None:
        row[name] = cell
    else:
        row[name][inner] = cell
