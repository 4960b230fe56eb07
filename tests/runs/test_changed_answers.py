"""The answers that an adapter changed, as a run prints them at its end."""

import io
import json

import pytest
from rich.console import Console

from reft_lightning.runs.changed_answers import print_changed_answers


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "predictions").mkdir()
    return tmp_path


def write(folder, who, rows):
    lines = (json.dumps(row) for row in rows)
    (folder / "predictions" / f"{who}_test.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def row(i, answer):
    return {
        "task": "t",
        "source": f"row {i}",
        "prompt": f"question [{i}]\nin two lines",
        "answer": answer,
        "gold": "yes",
        "correct": answer == "yes",
    }


def shown(folder):
    out = io.StringIO()
    print_changed_answers(folder, "loreft", Console(file=out, width=160))
    return out.getvalue()


def test_five_rows_from_all_over_the_test_set_stand_for_those_that_changed(folder):
    write(folder, "base", [row(i, "no") for i in range(20)] + [row(20, "yes"), row(21, None)])
    write(folder, "reft", [row(i, "yes") for i in range(20)] + [row(20, "no"), row(21, "no")])
    text = shown(folder)
    assert "20 of 22 became right, 1 became wrong" in text
    assert [f"question [{i}] in two lines" in text for i in (0, 5, 10, 15, 20)] == [True] * 5
    assert text.count("question") == 1 + 5  # the heading and the rows
    assert "question [21]" not in text  # wrong before and after


def test_rows_in_another_order_are_still_compared_with_themselves(folder):
    rows = [row(i, "yes" if i % 2 else "no") for i in range(4)]
    write(folder, "base", [rows[i] for i in (0, 2, 1, 3)])  # as two processes write them
    write(folder, "reft", rows)
    assert shown(folder) == ""


def test_a_long_question_is_shown_by_its_end_and_a_missing_answer_as_none(folder):
    long = {
        "task": "t",
        "source": "row 0",
        "prompt": "x" * 200 + " the end",
        "answer": None,
        "gold": "yes",
        "correct": False,
    }
    write(folder, "base", [long])
    write(folder, "reft", [{**long, "answer": "yes", "correct": True}])
    text = shown(folder)
    assert "xx the end" in text
    assert "x" * 61 not in text
    assert "(none)" in text


def test_an_answer_is_shown_as_it_was_given(folder, capsys):
    write(folder, "base", [row(0, ":100:")])  # rich's code for an emoji
    write(folder, "reft", [row(0, "yes")])
    print_changed_answers(folder, "loreft")
    assert ":100:" in capsys.readouterr().out


def test_nothing_is_said_without_the_base_or_without_a_change(folder):
    write(folder, "reft", [row(0, "yes")])
    assert shown(folder) == ""
    write(folder, "base", [row(0, "yes")])
    assert shown(folder) == ""
