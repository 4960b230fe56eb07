"""``resume=auto``: the same command continues the run that it started, or starts one."""

import json
import shutil
import subprocess
import sys

import pytest
import short_runs

from reft_lightning import cli
from reft_lightning.runs import experiment, run_folder
from reft_lightning.storage import atomic


@pytest.fixture
def train(data, tmp_path, monkeypatch):
    """Run ``reft-train ... resume=auto`` for 6 steps, in its own folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def command(*overrides, auto="resume=auto"):
        arguments = [*short_runs.arguments(data), "trainer.max_epochs=1", auto, *overrides]
        monkeypatch.setattr(sys, "argv", ["reft-train", *arguments])
        with short_runs.log_kept():
            return cli.train()

    return command


def stopped(monkeypatch, train, *overrides, batch=4):
    with monkeypatch.context() as patch:
        short_runs.stop_at(patch, batch)
        with pytest.raises((short_runs.Stop, SystemExit)):
            train(*overrides)


def runs_in(folder):
    return sorted(path.parent for path in folder.glob("outputs/*/*/results.json"))


def test_the_command_goes_on_with_its_own_run_and_begins_another_when_that_is_complete(
    train, tmp_path, monkeypatch
):
    stopped(monkeypatch, train)
    stopped(monkeypatch, train, "seed=7")
    stopped(monkeypatch, train, "name=mine")
    assert len(runs_in(tmp_path)) == 3
    train()
    first = [folder for folder in runs_in(tmp_path) if short_runs.results(folder)["status"] == "complete"]
    assert len(first) == 1
    assert short_runs.results(first[0])["seed"] == 42
    assert first[0].parent.name == "run"
    assert len(list(first[0].glob("csv*"))) == 2  # both parts are in its folder
    assert "resume=auto" in short_runs.results(first[0])["command"]
    train()
    assert len(runs_in(tmp_path)) == 4
    whole = short_runs.checkpoint(runs_in(tmp_path)[-1])["state_dict"]
    for name, tensor in short_runs.checkpoint(first[0])["state_dict"].items():
        assert tensor.equal(whole[name]), name


def test_a_folder_that_is_named_is_gone_on_with_until_it_is_complete(train, tmp_path, monkeypatch, capsys):
    place = f"hydra.run.dir={tmp_path / 'mine'}"
    stopped(monkeypatch, train, place, "test=false")
    train(place, "test=false")
    complete = short_runs.results(tmp_path / "mine")
    assert complete["status"] == "complete"
    capsys.readouterr()
    train(place, "test=false")
    assert capsys.readouterr().out.endswith("is complete: nothing is left to do\n")
    train(place, "test=true")
    assert capsys.readouterr().out.endswith(
        f"except to test it: reft-eval run={tmp_path / 'mine'} split=test\n"
    )
    assert short_runs.results(tmp_path / "mine") == complete
    with pytest.raises(SystemExit):
        train(place, "optimizer.lr=0.1")
    assert short_runs.results(tmp_path / "mine") == complete


def test_a_sweep_runs_its_missing_jobs_only(train, tmp_path, monkeypatch, capsys):
    sweep = ("-m", "seed=1,2", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    stopped(monkeypatch, train, *sweep, batch=10)  # in the second job
    jobs = sorted(tmp_path.glob("sweep/*/results.json"))
    first, second = (json.loads(path.read_text()) for path in jobs)
    assert (first["status"], second["status"]) == ("complete", "stopped")
    train(*sweep)
    assert json.loads(jobs[0].read_text()) == first
    assert json.loads(jobs[1].read_text())["status"] == "complete"
    with pytest.raises(SystemExit):
        train(*sweep[:2])
    assert "add hydra.sweep.dir=FOLDER" in capsys.readouterr().err


HOLD = """
import sys
from reft_lightning.storage.atomic import hold_folder
print(hold_folder(sys.argv[1]), flush=True)
input()
"""


@pytest.fixture
def hold(root):
    """Hold a folder in another process."""
    began = []

    def other(folder):
        command = [sys.executable, "-c", HOLD, str(folder)]
        began.append(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)
        )
        return began[-1], began[-1].stdout.readline().strip() == "True"

    yield other
    for process in began:
        process.kill()
        process.communicate()


def test_a_run_of_another_process_is_left_alone_until_that_is_killed(
    train, data, tmp_path, monkeypatch, hold
):
    stopped(monkeypatch, train)
    (folder,) = runs_in(tmp_path)
    process, held = hold(folder)
    assert held
    with pytest.raises(experiment.SetupError, match="another process is working on the run in"):
        short_runs.run(data, folder, "trainer.max_epochs=1", f"resume={folder}")
    config = short_runs.config(data, "trainer.max_epochs=1")
    assert run_folder.find_unfinished(folder.parent, config) is None
    process.kill()
    process.communicate()
    assert run_folder.find_unfinished(folder.parent, config) == folder
    assert hold(folder)[1] is False  # two that ask at once get different runs
    atomic.release_folder(folder)
    assert hold(folder)[1] is True


def test_a_run_that_was_killed_before_its_first_checkpoint_keeps_what_it_has(train, tmp_path, monkeypatch):
    place = (f"hydra.run.dir={tmp_path / 'mine'}", "evaluate_base=true")
    stopped(monkeypatch, train, *place, batch=0)
    base = {
        k: v for k, v in short_runs.results(tmp_path / "mine")["metrics"].items() if k.startswith("base/")
    }
    assert not (tmp_path / "mine" / "checkpoints" / "last.ckpt").exists()
    train(*place)
    results = short_runs.results(tmp_path / "mine")
    assert (results["status"], results["steps"]) == ("complete", 6)
    assert [read["model"] for read in results["test_reads"]] == ["base", "adapted"]
    assert base.items() <= results["metrics"].items()


def test_a_run_that_was_moved_keeps_its_best_score(data, tmp_path):
    best = ("optimizer.lr=0.2", "trainer.max_epochs=3")
    whole = short_runs.run(data, tmp_path / "whole", *best)
    short_runs.interrupt(data, tmp_path / "here", 15, *best)
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = short_runs.run(data, tmp_path / "there", *best, f"resume={tmp_path / 'there'}")
    for key in ("best_step", "chosen_by"):
        assert moved[key] == whole[key]
    assert moved["metrics"]["val/loss"] == whole["metrics"]["val/loss"]


def test_rows_that_have_changed_are_not_mixed_with_those_before(tmp_path):
    data = short_runs.write_rows(tmp_path / "rows")
    short_runs.interrupt(data, tmp_path / "run", 2)
    file = data / "boolq" / "train.json"
    file.write_text(file.read_text().replace("kept", "lost"))
    with pytest.raises(experiment.SetupError, match="the train rows of boolq have changed since it started"):
        short_runs.run(data, tmp_path / "run", f"resume={tmp_path / 'run'}")
