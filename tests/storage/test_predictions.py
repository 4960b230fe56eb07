"""Predictions of two evaluations are matched by what they answer, whatever their order."""

import json

import pytest

from reft_lightning.storage.predictions import keyed, read_predictions


def row(source, **more):
    return {"task": "t", "source": source, **more}


def test_rows_are_known_by_task_source_and_how_often_the_source_occurred_before():
    keys = [key for key, _ in keyed([row("a"), row("b"), row("a")])]
    assert keys == [("t", "a", 0), ("t", "b", 0), ("t", "a", 1)]


def test_a_text_may_hold_ends_of_lines_that_json_does_not_escape(tmp_path):
    file = tmp_path / "reft_test.jsonl"
    text = json.dumps(row("a", generated="one\u2028two"), ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
    assert read_predictions(file)["t", "a", 0]["generated"] == "one\u2028two"
    assert read_predictions(tmp_path / "none.jsonl") == {}


@pytest.mark.parametrize("line", ["{", "[]", '{"task": "t"}', ""])
def test_a_damaged_line_is_named(tmp_path, line):
    file = tmp_path / "reft_test.jsonl"
    file.write_text(json.dumps(row("a")) + f"\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"reft_test\.jsonl, line 2 is not a prediction"):
        read_predictions(file)
