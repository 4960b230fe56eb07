"""A job of a sweep in its own process: where it starts, and that it does not outlive the sweep."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import short_runs
from hydra.errors import CompactHydraException

from reft_lightning.runs import own_process
from reft_lightning.runs.sweep import Job

POPEN = subprocess.Popen
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
    started = run_instead(monkeypatch, tmp_path, "pass")
    own_process.run_in_own_process(tmp_path, Job(lambda *_: None))
    assert started["cwd"] == str(tmp_path)


def test_a_rank_that_waits_for_one_that_has_failed_ends(monkeypatch, tmp_path):
    """torch waits for half an hour, and does not hear SIGTERM."""
    for name, value in (("PATIENCE", 0.5), ("LOOKING", 0.1)):
        monkeypatch.setattr(own_process, name, value)
    for name, value in {
        "SLURM_NTASKS": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_NAME": "job",
    }.items():
        monkeypatch.setenv(name, value)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    for code, reason in (("raise SystemExit(1)", "exit status 1"), (deaf, "another rank failed")):
        run_instead(monkeypatch, tmp_path, code)
        (tmp_path / "results.json").write_text('{"status": "running"}')
        with pytest.raises(CompactHydraException, match=rf"the run ended .*{reason}; for its output"):
            own_process.run_in_own_process(tmp_path, Job(lambda *_: None))
        assert short_runs.results(tmp_path)["error"] == reason
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # requeued, nothing has failed
    run_instead(monkeypatch, tmp_path, "import time; time.sleep(0.3)")
    own_process.run_in_own_process(tmp_path, Job(lambda *_: None))


def run_instead(monkeypatch, folder, code):
    """Let the process of a job run other code; return the arguments it is started with."""
    started = {}

    def start(command, **arguments):
        started.update(arguments)
        return POPEN([sys.executable, "-c", code])

    hydra = SimpleNamespace(
        runtime=SimpleNamespace(cwd=str(folder)), overrides=SimpleNamespace(task=["seed=1"], hydra=[])
    )
    monkeypatch.setattr(own_process.subprocess, "Popen", start)
    monkeypatch.setattr(own_process.HydraConfig, "get", staticmethod(lambda: hydra))
    monkeypatch.setattr(sys, "argv", ["reft-train"])
    (folder / "results.json").write_text('{"status": "complete"}')
    return started
