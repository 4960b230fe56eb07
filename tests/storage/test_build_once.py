"""Folders that are built once: a damaged, partial or foreign one is built again, by one process."""

import json
import multiprocessing
import sys
import time

import pytest

from reft_lightning.storage.build_once import is_whole, publish


def build(part):
    (part / "inner").mkdir()
    (part / "one").write_text("1111")
    (part / "inner" / "two").write_text("22")


def refuse(part):
    raise AssertionError("a whole folder was built again")


@pytest.fixture
def folder(tmp_path):
    return publish(tmp_path / "made", build)


def damage(folder, how):
    record = folder.with_name("made.json")
    if how == "cut":
        (folder / "one").write_text("11")
    elif how == "changed":
        (folder / "one").write_text("1011")
    elif how == "lost":
        (folder / "inner" / "two").unlink()
    elif how == "foreign":
        (folder / "three").write_text("3")
    elif how == "no record":  # killed between the move and the record
        record.unlink()
    elif how == "half a record":
        record.write_text(record.read_text()[:9])
    else:
        for file in (folder / "one", folder / "inner" / "two"):
            file.unlink()
        (folder / "inner").rmdir()
        folder.rmdir()


DAMAGES = ("cut", "changed", "lost", "foreign", "no record", "half a record", "no folder")


def test_a_whole_folder_is_not_built_again(folder):
    assert is_whole(folder)
    assert publish(folder, refuse) == folder
    assert json.loads(folder.with_name("made.json").read_text()).keys() == {"inner/two", "one"}


def test_a_whole_folder_serves_where_nothing_can_be_written(folder):
    folder.with_name("made.lock").unlink(missing_ok=True)
    before = sorted(folder.parent.iterdir())
    publish(folder, refuse)
    assert sorted(folder.parent.iterdir()) == before  # not even a lock


@pytest.mark.parametrize("how", DAMAGES)
def test_a_folder_that_is_not_whole_is_built_again(folder, how):
    damage(folder, how)
    assert not is_whole(folder)
    publish(folder, build)
    assert (folder / "one").read_text() + (folder / "inner" / "two").read_text() == "111122"
    assert not (folder / "three").exists()
    publish(folder, refuse)


@pytest.mark.parametrize("how", ["cut", "no folder"])
def test_a_building_that_fails_leaves_no_folder_that_is_used(folder, how):
    damage(folder, how)

    def fail(part):
        (part / "one").write_text("1111")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        publish(folder, fail)
    assert not is_whole(folder)
    assert [path.name for path in folder.parent.iterdir() if "part" in path.name] == []


def build_and_count(folder, log):
    def logged(part):
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(0.1)  # so that the others come before it is whole
        build(part)

    publish(folder, logged)
    assert is_whole(folder)


@pytest.mark.parametrize("how", ["cut", "no folder"])
def test_processes_that_find_no_whole_folder_build_it_once(folder, tmp_path, how):
    damage(folder, how)
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    arguments = (folder, tmp_path / "log")
    workers = [context.Process(target=build_and_count, args=arguments) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert (tmp_path / "log").read_text() == "built\n"
