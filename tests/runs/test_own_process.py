"""A job of a sweep in its own process: where it starts, and that it does not outlive the sweep."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from reft_lightning.runs import own_process
from reft_lightning.runs.sweep import Job

CHILD = """
import signal, time
signal.signal(signal.SIGTERM, lambda *_: open("told", "w").close() or exit())
time.sleep(60)
"""
PARENT = f"""
import subprocess, sys
from reft_lightning.runs.own_process import _as_a_job
subprocess.Popen([sys.executable, "-c", {CHILD!r}], preexec_fn=_as_a_job)
print("started", flush=True)
input()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl(PR_SET_PDEATHSIG) is Linux's")
def test_a_job_is_told_to_stop_when_its_sweep_is_killed(root, tmp_path):
    environment = {"PYTHONPATH": str(root), "PATH": ""}
    sweep = subprocess.Popen([sys.executable, "-c", PARENT], cwd=tmp_path, env=environment, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert sweep.stdout.readline().strip() == "started"
    time.sleep(1)  # until its child listens
    sweep.kill()
    sweep.communicate()
    until = time.monotonic() + 10
    while not (tmp_path / "told").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert (tmp_path / "told").exists()


def test_a_job_starts_where_its_sweep_did_whatever_folder_it_works_in(monkeypatch, tmp_path):
    """Under hydra.job.chdir=true the current folder is the job's, not that of relative paths and modules."""
    started = {}

    def start(command, **arguments):
        started.update(arguments)
        return SimpleNamespace(wait=lambda *_: 0, terminate=lambda: None, kill=lambda: None)

    hydra = SimpleNamespace(
        runtime=SimpleNamespace(cwd="/there"), overrides=SimpleNamespace(task=["seed=1"], hydra=[])
    )
    monkeypatch.setattr(own_process.subprocess, "Popen", start)
    monkeypatch.setattr(own_process.HydraConfig, "get", staticmethod(lambda: hydra))
    monkeypatch.setattr(sys, "argv", ["reft-train"])
    (tmp_path / "results.json").write_text('{"status": "complete"}')
    own_process.run_in_own_process(tmp_path, Job(lambda *_: None))
    assert started["cwd"] == "/there"
