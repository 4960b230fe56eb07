"""Files that are written whole or not at all."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from reft_lightning.storage.atomic import claim_folder, hold_folder, release_folder, write_json, write_whole


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


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    path, flushed, replace = tmp_path / "results.json", [], os.replace
    write_json(path, 1)
    monkeypatch.setattr(os, "fsync", lambda number: flushed.append(os.fstat(number)))
    monkeypatch.setattr(os, "replace", lambda *names: flushed.append(names) or replace(*names))
    write_json(path, 20)
    (file, names), of_20 = flushed, path.stat()
    assert (file.st_ino, file.st_size) == (of_20.st_ino, of_20.st_size)
    assert names == (path.with_name("results.json.partial"), path)


def test_nothing_remains_of_a_file_that_could_not_be_written(tmp_path):
    def fail(partial):
        partial.write_text("{")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "results.json", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_json_does_not_have_is_null(tmp_path):
    nan, inf = float("nan"), float("inf")
    write_json(tmp_path / "a.json", {"loss": nan, "by_seed": {1: -inf, 2.5: (0.5, [inf])}, "name": "NaN"})
    text = (tmp_path / "a.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found == {"loss": None, "by_seed": {"1": None, "2.5": [0.5, [None]]}, "name": "NaN"}


def test_a_folder_is_claimed_once(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda _: claim_folder(tmp_path / "runs" / "now"), range(8)))
    names = ["now", *(f"now-{number}" for number in range(2, 9))]
    assert sorted(folder.name for folder in claimed) == sorted(names)


def test_a_disk_without_locks_costs_the_lock_only(tmp_path, monkeypatch, caplog):
    def lockf(file, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.lockf", lockf)
    assert hold_folder(tmp_path)
    assert f"{tmp_path} cannot be reserved" in caplog.text
    release_folder(tmp_path)
