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
SRUN = ("srun", "--nodes=2", "--ntasks-per-node=1")


def needs(launcher):
    plugin = f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher"
    pytest.importorskip(plugin, reason=f"no plugin of Hydra for launcher={launcher}")
    if launcher == "submitit_slurm" and shutil.which("sbatch") is None:
        pytest.skip("no SLURM here: sbatch is not found")


def variables(root):
    kept = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES} | {"OMP_NUM_THREADS": "1"}
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))}


def start(data, root, folder, *overrides):
    command = [sys.executable, "-m", "reft_lightning.cli", "-m", *short_runs.arguments(data), *overrides]
    return subprocess.Popen(
        [*command, f"hydra.sweep.dir={folder.name}"], cwd=folder.parent, env=variables(root), text=True,
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


@pytest.mark.parametrize("name", ["job.sh", "interactive", "bash"])  # salloc names its job interactive
def test_ranks_that_srun_started_wait_for_each_other_whatever_their_job_is_called(
    data, slurm, tmp_path, name
):
    slurm(NTASKS="2", NNODES="2", NTASKS_PER_NODE="1", STEP_ID="0", JOB_NAME=name)
    found = environment(data, tmp_path, "trainer.num_nodes=2", "trainer.devices=1", "trainer.strategy=ddp")
    assert isinstance(found, SLURMEnvironment)
    assert found.world_size() == 2
    assert not found.auto_requeue  # its launcher decides


@pytest.mark.parametrize("job", [{"NTASKS": "2"}, {"STEP_ID": "0"}], ids=["without srun", "one task"])
def test_a_run_that_srun_did_not_start_for_each_rank_starts_them_itself(data, slurm, tmp_path, job):
    slurm(**job)  # Lightning would wait for the second task forever, or train without it
    assert not environment(
        data, tmp_path, "trainer.devices=2", "trainer.strategy=ddp"
    ).creates_processes_externally
    with pytest.raises(
        ValueError, match=r"num_nodes=2 in a SLURM job: .* srun --nodes=2 --ntasks-per-node=N"
    ):
        environment(data, tmp_path, "trainer.num_nodes=2", "trainer.devices=1", "trainer.strategy=ddp")


def test_tasks_that_are_not_counted_by_node_are_refused(data, slurm, tmp_path):
    slurm(NTASKS="2", STEP_ID="0")
    with pytest.raises(ValueError, match="srun started 2 processes without --ntasks-per-node"):
        environment(data, tmp_path, "trainer.devices=2", "trainer.strategy=ddp")


@pytest.mark.parametrize(
    ("tasks", "nodes", "overrides", "fitting"),
    [
        (2, 2, [], "--nodes=1 --ntasks-per-node=1, or set trainer.num_nodes=2 trainer.devices=1"),
        (
            2,
            1,
            ["trainer.num_nodes=2"],
            "--nodes=2 --ntasks-per-node=1, or set trainer.num_nodes=1 trainer.devices=2",
        ),
        (
            2,
            2,
            ["trainer.devices=2"],
            "--nodes=1 --ntasks-per-node=2, or set trainer.num_nodes=2 trainer.devices=1",
        ),
        (3, 2, ["trainer.devices=2", "trainer.num_nodes=2"], "--nodes=2 --ntasks-per-node=2"),
    ],
)
def test_another_number_of_processes_than_the_run_uses_is_refused_before_weights_are_loaded(
    data, slurm, tmp_path, tasks, nodes, overrides, fitting
):
    slurm(NTASKS=str(tasks), NNODES=str(nodes), NTASKS_PER_NODE="1", STEP_ID="0")
    strategy = ["trainer.strategy=ddp"] if overrides else []  # without, each process would train on its own
    settings = ["trainer.devices=1", *overrides, *strategy]
    with pytest.raises(ValueError, match=f"srun started {tasks} processes on {nodes} node") as refused:
        short_runs.run(data, tmp_path / "run", *settings)
    assert str(refused.value).endswith(f"start the command with srun {fitting}")
    assert not (tmp_path / "run").exists()


def test_another_number_of_processes_of_torchrun_than_the_run_uses_is_refused(data, monkeypatch, tmp_path):
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**ranks, "TORCHELASTIC_RUN_ID": "run"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match=r"torchrun started 4 .* on 2 nodes, .* --nnodes=1 --nproc-per-node=1, or"
    ):
        short_runs.run(data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


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


@pytest.fixture
def on_two_nodes(data, root, tmp_path):
    """A function that runs a command of SLURM before ``reft-train`` with two ranks, of which each node has one."""
    known = ["sinfo", "-h", "-N", "-o", "%N"]
    listed = subprocess.run(known, capture_output=True, text=True).stdout if shutil.which("sinfo") else ""
    if len(listed.split()) < 2:
        pytest.skip("no SLURM with two nodes here: experiments/cluster/local_slurm.sh FOLDER start 2")
    train = [sys.executable, "-m", "reft_lightning.cli", *short_runs.arguments(data), "trainer.strategy=ddp"]

    def run(before, *overrides):
        return subprocess.run(
            [*before, *train, *overrides],
            cwd=tmp_path,
            env=variables(root),
            text=True,
            capture_output=True,
            timeout=300,
        )

    return run


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_nodes_train_as_two_ranks_of_one_machine_do(on_two_nodes, tmp_path):
    apart = ("trainer.num_nodes=2", "trainer.devices=1")
    for name in ("job", "interactive"):
        ran = on_two_nodes([*SRUN, f"--job-name={name}"], *apart, f"hydra.run.dir={name}")
        assert ran.returncode == 0, ran.stderr[-3000:]
    ran = on_two_nodes([], "trainer.devices=2", "hydra.run.dir=machine")
    assert ran.returncode == 0, ran.stderr[-3000:]
    for name in (
        "adapter/reft.safetensors",
        "predictions/reft_test.jsonl",
        "predictions/reft_validation.jsonl",
    ):
        same = {(tmp_path / folder / name).read_bytes() for folder in ("machine", "job", "interactive")}
        assert len(same) == 1, name
    assert len((tmp_path / "job" / "reft-train.log").read_text().splitlines()) == 7  # of one writer
    refused = on_two_nodes(SRUN, "trainer.devices=1", "hydra.run.dir=alone")
    assert refused.returncode == 2
    assert "or set trainer.num_nodes=2 trainer.devices=1" in refused.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_over_two_nodes_that_is_queued_again_goes_on(on_two_nodes, tmp_path):
    long = ("trainer.num_nodes=2", "trainer.devices=1", "trainer.max_epochs=60", "test=false")
    ran = on_two_nodes(SRUN, *long, "hydra.run.dir=whole")
    assert ran.returncode == 0, ran.stderr[-3000:]
    script = tmp_path / "job.sh"
    script.write_text('#!/bin/bash\nsrun "$@"\n')
    batch = ["sbatch", "--parsable", "--requeue", *SRUN[1:], str(script)]
    job = on_two_nodes(batch, *long, "resume=auto", "hydra.run.dir=parts").stdout.strip()
    while not (tmp_path / "parts" / "checkpoints" / "last.ckpt").is_file():
        time.sleep(0.1)
    subprocess.run(["scontrol", "requeue", job], check=True)
    while subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True).stdout.strip():
        time.sleep(1)
    assert (short_runs.results(tmp_path / "parts")["status"], len(list(tmp_path.glob("parts/csv*")))) == (
        "complete",
        2,
    )
    whole, parts = (
        (tmp_path / name / "adapter" / "reft.safetensors").read_bytes() for name in ("whole", "parts")
    )
    assert whole == parts
