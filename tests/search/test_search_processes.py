"""Processes of a search: they end with their parent; the command's own arguments."""

import os
import signal
import sys
import time

import pytest

from reft_lightning import cli
from reft_lightning.search import command, process

SLEEPER = """
import time
from reft_lightning.search.process import end_with_parent
end_with_parent()
print("began", flush=True)
time.sleep(100)
"""


def test_a_trial_dies_with_its_worker_and_holds_the_lock_until_then(tmp_path):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    lock, output = process.Lock(tmp_path / "locks" / "a"), tmp_path / "log.txt"
    assert lock.acquire(wait=False)
    found = {"PYTHONPATH": os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))}
    running = process.start(["sleeper"], output, directory=tmp_path, lock=lock, environment=found)
    while "began" not in output.read_text():
        assert running.poll() is None, output.read_text()
        time.sleep(0.05)
    lock.release()
    assert not process.Lock(lock.path).acquire(wait=False)  # the trial still holds it
    process.stop(running)
    assert running.returncode == -signal.SIGKILL
    assert process.Lock(lock.path).acquire(wait=False)
    assert process.failure(running.returncode, output) == "killed by SIGKILL (out of memory?)\nbegan"


def test_a_worker_that_srun_started_several_times_runs_its_trials_alone(tmp_path, monkeypatch):
    (tmp_path / "ranks.py").write_text(
        "from reft_lightning.terminal.ranks import is_first_process, started_ranks\n"
        "print(started_ranks(), is_first_process())\n"
    )
    for name, value in {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}.items():
        monkeypatch.setenv(name, value)
    found = {"PYTHONPATH": os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))}
    running = process.start(["ranks"], tmp_path / "log.txt", directory=tmp_path, environment=found)
    assert running.wait(60) == 0
    running.stdin.close()
    assert (tmp_path / "log.txt").read_text() == "1 True\n"


def test_how_a_process_ended_and_the_end_of_its_log_are_kept(tmp_path):
    (tmp_path / "log").write_text("\n".join(map(str, range(50))))
    assert process.failure(0, tmp_path / "log") == ""
    assert process.failure(1, tmp_path / "log").splitlines() == ["exit status 1", *map(str, range(30, 50))]


def test_the_command_says_how_it_is_used(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reft-search"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as left:
        cli.search()
    assert left.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "reft-search search=NAME" in shown.err
    assert "examples:" in shown.err
    with pytest.raises(ValueError, match="workers must be an integer"):
        command.main(["search=small_stsb", "workers=none"])
    with pytest.raises(ValueError, match="arguments must have the form key=value"):
        command.main(["small_stsb"])
