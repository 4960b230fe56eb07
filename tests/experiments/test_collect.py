"""experiments/collect.py: results of run folders in one file, and nothing lost where the arguments are wrong."""

import json
import runpy

import pytest


@pytest.fixture
def collect(root):
    return runpy.run_path(str(root / "experiments" / "collect.py"))["main"]


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text("kept\n")
    return path


def run_folder(parent, name, **values):
    folder = parent / name
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"status": "complete", "run_dir": str(folder)} | values))
    return folder


def test_the_results_are_copied_without_the_places_of_the_machine(collect, target, tmp_path):
    rows = {"custom": {"from": [str(tmp_path / "train.jsonl")]}}
    first = run_folder(tmp_path, "a", seed=1, places_as_written={"data.path": "~/rows"}, data_versions=rows)
    second = run_folder(tmp_path, "b", seed=2)
    collect([str(target), str(first), str(second)])
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    names = {"custom": {"from": ["train.jsonl"]}}
    assert lines == [
        {"status": "complete", "seed": 1, "data_versions": names},
        {"status": "complete", "seed": 2},
    ]


def test_help_writes_no_file(collect, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        collect(["--help"])
    assert left.value.code == 0
    assert "usage:" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_collected_leaves_the_file_as_it_was(collect, target, tmp_path, capsys):
    good = run_folder(tmp_path, "good")
    for folders, said in (
        ([], "folder"),
        ([good, tmp_path / "nowhere"], "nowhere is no run folder: it has no results.json"),
        ([good, run_folder(tmp_path, "half", status="stopped")], "half is not complete: stopped"),
    ):
        with pytest.raises(SystemExit) as left:
            collect([str(target), *map(str, folders)])
        assert left.value.code == 2
        assert said in capsys.readouterr().err
        assert target.read_text() == "kept\n"
