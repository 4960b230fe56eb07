"""Sweeps under Hydra launchers, by the command: jobs that fail, that have ranks, that are requeued."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import short_runs
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from reft_lightning.adapters.saving import load_adapter
from reft_lightning.runs import own_process
from reft_lightning.runs.ddp_launch import RANK_VARIABLES
from reft_lightning.runs.sweep import Job
from reft_lightning.runs.trainer import build_trainer

LAUNCHERS = ("joblib", "submitit_local", "submitit_slurm", "ray")


def needs(launcher):
    plugin = f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher"
    pytest.importorskip(plugin, reason=f"no plugin of Hydra for launcher={launcher}")
    if launcher == "submitit_slurm" and shutil.which("sbatch") is None:
        pytest.skip("no SLURM here: sbatch is not found")


def start(data, root, folder, *overrides):
    environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
    environment |= {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "reft_lightning.cli", "-m", *short_runs.arguments(data), *overrides]
    return subprocess.Popen(
        [*command, f"hydra.sweep.dir={folder.name}"], cwd=folder.parent, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def jobs_of(folder):
    return sorted(path for path in folder.iterdir() if (path / ".hydra").is_dir())


class Requeued(Exception):
    """Raised here in place of submitit's handler, which exits."""


def test_a_job_is_queued_again_after_its_run_has_written_down_what_it_has(monkeypatch, tmp_path):
    python = tmp_path / "python"  # stands in for the run's process
    python.write_text(
        f"#!/bin/sh\necho $@ >> {tmp_path}/called\n"
        f"trap 'echo stopped >> {tmp_path}/called; exit 143' TERM\n"
        "kill -USR2 $$\nkill -USR2 $PPID\nwhile true; do sleep 0.1; done\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(own_process, "job_arguments", lambda argv: ["seed=2"])
    job_of_hydra = SimpleNamespace(runtime=SimpleNamespace(cwd=str(tmp_path)))
    monkeypatch.setattr(own_process, "HydraConfig", SimpleNamespace(get=lambda: job_of_hydra))
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    job, was = Job(lambda *_: None), []

    def requeue(number, frame):
        was.append(((tmp_path / "called").read_text().splitlines()[-1], job.requeued))
        raise Requeued

    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        for _ in range(2):
            with pytest.raises(Requeued):
                own_process.run_in_own_process(tmp_path, job)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert was == [("stopped", True)] * 2
    first, second = (tmp_path / "called").read_text().splitlines()[::2]
    assert first.endswith("hydra.mode=RUN")
    assert second.endswith("hydra.mode=RUN resume=auto")


@pytest.fixture
def slurm(monkeypatch):
    """A function that sets the variables of a SLURM job; `STEP_ID` is set only for what srun starts."""
    for name in (*RANK_VARIABLES, "RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)

    def job(**variables):
        common = {"NTASKS": "1", "NNODES": "1", "JOB_ID": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
        for name, value in {**common, "JOB_NAME": "job.sh", **variables}.items():
            monkeypatch.setenv(f"SLURM_{name}", value)

    return job


def environment(data, folder, *overrides):
    """What tells the ranks of a run from each other."""
    from reft_lightning.runs.checks import Monitor

    config = short_runs.config(data, *overrides)
    trainer = build_trainer(config, folder, Monitor("val/loss", "min"), torch.get_rng_state())
    return trainer._accelerator_connector.cluster_environment


def test_a_run_that_srun_started_leaves_requeuing_to_its_launcher(data, slurm, tmp_path):
    slurm(NTASKS_PER_NODE="1", STEP_ID="0")
    found = environment(data, tmp_path)
    assert isinstance(found, SLURMEnvironment)
    assert not found.auto_requeue


def test_a_run_in_a_batch_script_without_srun_starts_its_ranks_itself(data, slurm, tmp_path):
    slurm(NTASKS="2")  # Lightning would wait for the second task forever
    assert not environment(
        data, tmp_path, "trainer.devices=2", "trainer.strategy=ddp"
    ).creates_processes_externally
    with pytest.raises(ValueError, match=r"num_nodes=2 in a SLURM job: put srun before the command"):
        environment(data, tmp_path, "trainer.num_nodes=2", "trainer.devices=1", "trainer.strategy=ddp")


def test_tasks_that_are_not_counted_by_node_are_refused(data, slurm, tmp_path):
    slurm(NTASKS="2", STEP_ID="0")
    with pytest.raises(ValueError, match="--ntasks-per-node=2"):
        environment(data, tmp_path, "trainer.devices=2", "trainer.strategy=ddp")


def test_ranks_of_torchrun_within_a_slurm_job_stay_those_of_torchrun(data, slurm, monkeypatch, tmp_path):
    slurm()
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "GROUP_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    assert isinstance(environment(data, tmp_path), TorchElasticEnvironment)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_job_that_fails_or_is_killed_neither_hides_nor_ends_the_others(data, root, tmp_path, launcher):
    needs(launcher)
    (tmp_path / "die.py").write_text(
        "import os\nfrom lightning import Callback\n\n\nclass Die(Callback):\n"
        "    def on_train_batch_start(self, trainer, module, batch, batch_idx):\n"
        "        if trainer.optimizers[0].param_groups[0]['lr'] > 1e29:\n            os.kill(os.getpid(), 9)\n"
    )
    sweep = start(data, root, tmp_path / "sweep", f"launcher={launcher}", "logger=wandb",
                  "+callbacks.die._target_=die.Die", "scheduler=constant",
                  "optimizer.lr=1e-3,1e20,1e30,2e-3")  # fmt: skip
    said, errors = sweep.communicate(timeout=380)
    assert sweep.returncode == 1, errors[-3000:]
    jobs = jobs_of(tmp_path / "sweep")
    rates = ("0.001", "1e+20", "1e+30", "0.002")
    assert [job.name for job in jobs] == [f"{i}_optimizer.lr={rate}" for i, rate in enumerate(rates)]
    found = [short_runs.results(job) for job in jobs]
    assert [results["status"] for results in found] == ["complete", "stopped", "stopped", "complete"]
    assert [len(list(job.glob("wandb/offline-run-*"))) for job in jobs] == [1] * 4
    assert "2 jobs are complete, 2 of those that started are not; to compare them: reft-report sweep" in said
    assert "1_optimizer.lr=1e+20: stopped: FloatingPointError" in errors
    assert "2_optimizer.lr=1e+30: stopped: exit status -9" in errors
    words = shlex.split(found[0]["command"])
    assert "optimizer.lr=0.001" in words
    assert not [word for word in words if "launcher" in word]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_each_job_has_ranks_of_its_own(data, root, tmp_path, launcher):
    needs(launcher)
    sweep = start(data, root, tmp_path / "sweep", f"launcher={launcher}", "trainer.devices=2", "trainer.strategy=ddp",
                  "seed=1,2", "trainer.max_epochs=1")  # fmt: skip
    _, errors = sweep.communicate(timeout=380)
    assert sweep.returncode == 0, errors[-3000:]
    for job in jobs_of(tmp_path / "sweep"):
        results = short_runs.results(job)
        assert (results["status"], results["steps"]) == ("complete", 3)
        assert results["counts"]["val/boolq/accuracy"]["total"] == 6
        assert "x 2 devices" in "".join(path.read_text() for path in job.glob("*.log"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("launcher", LAUNCHERS[1:3])
def test_a_job_whose_place_is_taken_away_goes_on_from_its_checkpoint(data, root, tmp_path, launcher):
    needs(launcher)
    long = ("seed=1,2", "trainer.max_epochs=40", "test=false")
    sweep = start(data, root, tmp_path / "sweep", f"launcher={launcher}", *long)
    last = tmp_path / "sweep" / "0_seed=1" / "checkpoints" / "last.ckpt"
    while not last.is_file():
        assert sweep.poll() is None, sweep.communicate()[1][-3000:]
        time.sleep(0.1)
    signal_job(launcher, last.parents[1])
    _, errors = sweep.communicate(timeout=400)
    assert sweep.returncode == 0, errors[-3000:]
    interrupted = last.parents[1]
    assert len(list(interrupted.glob("csv*"))) == 2
    short_runs.run(data, tmp_path / "whole", "seed=1", *long[1:])
    whole, parts = (load_adapter(folder / "adapter")[1] for folder in (tmp_path / "whole", interrupted))
    assert all((whole[name] == parts[name]).all() for name in whole)
    assert short_runs.results(interrupted)["steps"] == 240


def signal_job(launcher, folder):
    """Signal the job of a run folder, as a cluster does when its time is over."""
    if launcher == "submitit_slurm":
        command = ["squeue", "-h", "-r", "-o", "%i %Z"]  # ids and working folders
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        ids = sorted(line.split()[0] for line in lines if line.endswith(str(folder.parents[1])))
        subprocess.run(["scancel", "--signal=USR2", ids[0]], check=True)
        return
    for process in Path("/proc").glob("[0-9]*"):
        words = []
        with suppress(OSError):  # it has ended
            words = (process / "cmdline").read_bytes().decode().split("\0")
        if f"hydra.run.dir='{folder}'" in words:
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            os.kill(int(parent), signal.SIGUSR2)
