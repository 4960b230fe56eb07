"""Rules for every benchmark family, checked on each of its rows in the fixtures."""

import copy
from pathlib import Path

import pytest

from reft_lightning.base_models.loading import byte_tokenizer
from reft_lightning.data import FAMILIES
from reft_lightning.data.encoding import Collator, encode
from reft_lightning.data.example import placed
from reft_lightning.data.prompts import apply_template
from reft_lightning.data.rows import DataSource, read_rows

FIXTURES = Path(__file__).parents[2] / "fixtures"
FOLDERS = sorted(p for p in FIXTURES.rglob("*") if p.is_dir() and p.name in ("rendered", "original")) + [
    FIXTURES / name
    for name in ("code", "glue", "instruction", "reading", "arithmetic", "commonsense", "skills")
]
CELLS = [
    None, 7, 1.5, True, "", " ", "ü", "9", [], [None], [7], ["a"], [[]], [{}], {}, {"text": None}, b"\xff", b"a",
]  # fmt: skip


def rows_of_fixtures():
    """Name -> family, task and rows, for each layout and split of each task in the fixtures."""
    found = {}
    for family in FAMILIES.values():
        for task in family.tasks.values():
            for folder in FOLDERS:
                for split in task.local:
                    try:
                        rows, _ = read_rows(task, split, DataSource("local", str(folder)))
                    except (FileNotFoundError, ValueError):
                        continue
                    found[f"{family.name} {task.name} {split} {folder.name}"] = (family, task, rows)
    return found


SETS = rows_of_fixtures()
ROWS = {
    (family.name, task.name, tuple(rows[0][0])): (task, rows[0][0]) for family, task, rows in SETS.values()
}
ANSWERED = [name for name, (family, _, _) in SETS.items() if family.kind == "generation"]


def test_every_family_has_rows_to_try():
    assert {family for family, _, _ in ROWS} == set(FAMILIES)


@pytest.fixture(params=ANSWERED)
def found(request):
    """A family and the examples of one of its sets."""
    family, task, rows = SETS[request.param]
    return family, [placed(task.example, row, where) for row, where in rows]


def test_the_tokens_of_a_prompt_begin_those_of_the_whole_and_labels_cover_exactly_the_target(found):
    family, made = found
    for tokenizer in (byte_tokenizer(add_bos=True), byte_tokenizer(add_bos=False)):
        examples = apply_template(family.template, made, tokenizer)
        rows = [encode(tokenizer, example, 8192) for example in examples]
        batch = Collator(tokenizer.pad_token_id)(rows)
        for example, row, labels in zip(examples, rows, batch["labels"], strict=True):
            whole = tokenizer(example.prompt + example.target)["input_ids"]
            assert row.joint
            assert row.prompt_ids == tokenizer(example.prompt)["input_ids"]
            assert row.prompt_ids + row.target_ids == [*whole, tokenizer.eos_token_id]
            kept = labels[labels != -100].tolist()
            assert kept[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(kept[:-1]) == example.target


def test_gold_against_gold_scores_1_by_every_measure(found):
    family, examples = found
    assert all(example.source and example.task in family.tasks for example in examples)
    for example in examples if family.score else ():
        judged = family.score([example.target], example)
        measures = [name for name in family.measures if name in ("pass@1",) or not name.startswith("pass@")]
        assert judged.scores == dict.fromkeys(measures, 1.0)
        assert judged.answer is not None


def test_exactly_one_of_the_options_is_the_target_and_right(found):
    family, examples = found
    for example in (example for example in examples if example.options):
        assert example.options.count(example.target) == 1
        assert len(set(example.options)) == len(example.options)
        if family.score:
            right = [family.score([option], example).scores[family.measures[0]] for option in example.options]
            assert sorted(right) == [0.0] * (len(right) - 1) + [1.0]


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
            for rendered in ("None", "b'"):  # Python's text for a value that is not text
                assert rendered not in read or rendered in str(row), (name, inner, cell)
    assert refused


def _places(row):
    """(column, key within it or None) for all cells, including those in lists and objects."""
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
