"""Processes of a search: they end with the one that started them; workers; the command's own arguments."""

import io
import os
import signal
import subprocess
import sys
import time

import pytest
from pretended_runs import make_plan

from reft_lightning.search import command, process

SLEEPER = """
import sys, time
from reft_lightning.search.process import end_with_parent
end_with_parent()
print("began", flush=True)
time.sleep(100)
"""


def began(log, process_):
    while "began" not in process.last_lines(log):
        assert process_.poll() is None, process.last_lines(log)
        time.sleep(0.05)


def test_a_trial_dies_with_its_worker_and_holds_the_lock_until_then(tmp_path):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    lock = process.Lock(tmp_path / "locks" / "a")
    assert lock.acquire(wait=False)
    running = process.start(["sleeper"], tmp_path / "log.txt", {}, tmp_path, lock)
    began(tmp_path / "log.txt", running)
    lock.release()
    assert not process.Lock(lock.path).acquire(wait=False)  # the trial holds it still
    process.stop(running)
    assert running.returncode == -signal.SIGKILL
    assert process.Lock(lock.path).acquire(wait=False)
    assert process.said_of(running.returncode) == "killed by SIGKILL (out of memory?)"


def test_a_signal_to_end_interrupts_as_ctrl_c_does():
    before = signal.getsignal(signal.SIGTERM)

    def end():
        with process.interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        end()
    assert signal.getsignal(signal.SIGTERM) == before


def test_how_a_process_ended_is_said(tmp_path):
    assert process.said_of(1) == "exit status 1"
    (tmp_path / "log").write_text("\n".join(map(str, range(50))))
    assert process.last_lines(tmp_path / "log").splitlines() == [str(i) for i in range(30, 50)]


def test_every_worker_knows_when_the_command_was_started(tmp_path, monkeypatch):
    class Ended:
        stdin = io.BytesIO()

        def wait(self, patience=None):
            return 0

    started, opened = [], []
    monkeypatch.setattr(command, "start", lambda arguments, *_: started.append(arguments) or Ended())
    monkeypatch.setattr(command, "work", lambda study, runner: opened.append(study))
    monkeypatch.setattr(command, "end_with_parent", lambda *_: None)
    command.write_plan(tmp_path, make_plan(), "val/accuracy", "max", str(tmp_path))
    command.run(tmp_path, 2, 123.5)
    for arguments in started:
        command.run_worker(arguments[1:])
    assert [study.since for study in opened] == [123.5, 123.5]
    assert all(study.environment.keys() <= {"OMP_NUM_THREADS"} for study in opened)


def test_the_command_says_how_it_is_used():
    code = "import sys; sys.argv = ['reft-search']; from reft_lightning.cli import search; search()"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 2
    assert "reft-search search=NAME" in shown.stdout
    with pytest.raises(ValueError, match="workers must be an integer"):
        command.main(["search=small_stsb", "workers=none"])
    with pytest.raises(ValueError, match="arguments are written key=value"):
        command.main(["small_stsb"])
