"""Files that are written whole or not at all."""

import json

import pytest

from reft_lightning.storage.atomic import write_json, write_whole


def test_a_writer_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})

    def fail(partial):
        partial.write_text("{")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert json.loads(path.read_text()) == {"a": 1}


def test_nothing_remains_next_to_a_file_that_was_written(tmp_path):
    for value in (1, 2):
        write_json(tmp_path / "results.json", value)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_text() == "2\n"
