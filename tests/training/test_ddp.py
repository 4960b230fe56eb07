"""Two processes on CPU are one process with twice the batch, through the command line."""

import os
import signal
import subprocess
import sys
import time

import pytest
import short_runs
import torch

from reft_lightning.adapters.saving import load_adapter
from reft_lightning.runs import ddp_launch

TWO = ("trainer.devices=2", "trainer.strategy=ddp")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows whose targets have one length, in whole batches.

    The mean of the means of two times 3 rows is then the mean over 6 rows.
    """
    return short_runs.write_rows(tmp_path_factory.mktemp("rows"), train=31, test=7, answer="true")


def process_environment(root):
    environment = {k: v for k, v in os.environ.items() if k not in ddp_launch.RANK_VARIABLES}
    # one thread a process: two processes of many threads wait for each other on few cores
    return environment | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}


def reft_train(data, root, cwd, *overrides):
    return subprocess.run(
        [sys.executable, "-m", "reft_lightning.cli", *overrides[:1], *short_runs.arguments(data), *overrides[1:]],
        cwd=cwd, env=process_environment(root), capture_output=True, text=True, timeout=180,
    )  # fmt: skip


@pytest.fixture(scope="module")
def both(data, tmp_path_factory, root):
    folder = tmp_path_factory.mktemp("ddp")
    common = ("data.group_by_length=false", "data.validation_size=7", "optimizer.weight_decay=0.1",
              "evaluate_base=true")  # fmt: skip
    done = reft_train(data, root, folder, *common, *TWO, f"hydra.run.dir={folder / 'two'}")
    assert done.returncode == 0, done.stderr[-3000:]
    short_runs.run(data, folder / "one", *common, "data.batch_size=6")
    return folder / "one", folder / "two"


@pytest.mark.slow
def test_two_processes_train_the_adapter_of_one_with_twice_the_batch(both):
    one, two = (load_adapter(folder / "adapter")[1] for folder in both)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=0)
    steps = [short_runs.results(folder)["steps"] for folder in both]
    assert steps[0] == steps[1] == 8  # 24 train rows, 6 a step, 2 epochs


@pytest.mark.slow
def test_two_processes_count_every_row_once(both):
    one, two = (short_runs.results(folder) for folder in both)
    for name, count in one["counts"].items():
        assert two["counts"][name] == count, name
        assert count["total"] == 7
    assert two["metrics"]["val/loss"] == pytest.approx(one["metrics"]["val/loss"], abs=1e-5)
    for name in ("base_test", "reft_validation", "reft_test"):
        expected = {row["source"]: row for row in short_runs.predictions(both[0], name)}
        rows = short_runs.predictions(both[1], name)
        assert len(rows) == len(expected) == 7
        assert {row["source"]: row for row in rows} == expected
    assert [(read["model"], read["rows"]) for read in two["test_reads"]] == [("base", 7), ("adapted", 7)]
    assert two["tokens"] == one["tokens"]


@pytest.mark.slow
def test_a_sweep_under_two_processes_goes_on_after_a_job_that_fails(data, tmp_path, root):
    done = reft_train(data, root, tmp_path, "-m", *TWO, "optimizer.lr=1e-3,1e30,2e-3", "trainer.max_epochs=1",
                      f"hydra.sweep.dir={tmp_path / 'sweep'}", "hydra.sweep.subdir=${hydra.job.num}")  # fmt: skip
    found = [short_runs.results(tmp_path / "sweep" / str(job)) for job in range(3)]
    assert [results["status"] for results in found] == ["complete", "stopped", "complete"]
    assert "lower optimizer.lr" in found[1]["error"]
    assert [len(results["test_reads"]) for results in found] == [1, 0, 1]
    assert found[0]["steps"] == found[2]["steps"] == 5
    assert done.returncode == 1, done.stderr[-3000:]
    assert len(list(tmp_path.rglob("results.json"))) == len(list(tmp_path.rglob(".hydra"))) == 3
    orphans, until = ["not looked yet"], time.monotonic() + 20
    while orphans and time.monotonic() < until:
        processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        orphans = [line for line in processes.splitlines() if str(tmp_path) in line]
        time.sleep(0.2)
    assert orphans == []


@pytest.mark.slow
def test_processes_with_different_numbers_of_validation_batches_do_not_wait(data, tmp_path, root):
    # 5 rows in batches of 1 are 3 batches of one process and 2 of the other
    done = reft_train(data, root, tmp_path, *TWO, "data.validation_size=5", "data.eval_batch_size=1",
                      "trainer.max_epochs=1", "test=false", f"hydra.run.dir={tmp_path / 'run'}")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    counts = short_runs.results(tmp_path / "run")["counts"]
    assert {count["total"] for count in counts.values()} == {5}


@pytest.mark.slow
def test_a_process_without_any_rows_to_evaluate_is_refused(data, tmp_path, root):
    done = reft_train(
        data, root, tmp_path, *TWO, "data.validation_size=1", f"hydra.run.dir={tmp_path / 'run'}"
    )
    assert done.returncode != 0
    assert "2 processes evaluate 1 rows a task" in done.stderr


@pytest.mark.slow
def test_two_processes_that_are_told_to_stop_end_together_and_go_on(data, tmp_path, root):
    run, last = tmp_path / "run", tmp_path / "run" / "checkpoints" / "last.ckpt"
    command = [sys.executable, "-m", "reft_lightning.cli", *short_runs.arguments(data), *TWO, "trainer.max_epochs=12",
               f"hydra.run.dir={run}"]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=tmp_path, env=process_environment(root),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until = time.monotonic() + 120
    while not last.is_file() and time.monotonic() < until:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    stopped = short_runs.results(run)
    assert (stopped["status"], stopped["signal"]) == ("stopped", "SIGTERM")
    done = subprocess.run([*command[:3], f"resume={run}"], cwd=tmp_path, env=process_environment(root), check=False,
                          capture_output=True, text=True, timeout=180)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = short_runs.results(run)
    assert (results["status"], results["steps"]) == ("complete", 60)  # 25 rows, 6 a step
