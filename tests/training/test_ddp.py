"""Two processes on CPU are equivalent to one process with twice the batch size, through the command line."""

import json
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

TWO = ("trainer=ddp", "trainer.devices=2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """23 train rows whose targets have 23 to 65 tokens; the last step has 5 rows, the others 6."""
    folder = short_runs.write_rows(tmp_path_factory.mktemp("rows"), train=30, test=7)
    path = folder / "boolq" / "train.json"
    rows = json.loads(path.read_text())
    for i, row in enumerate(rows):
        longer = f"false{' indeed' * (i % 6)}"
        for column in ("instruction", "output", "answer"):
            row[column] = row[column].replace("false", longer)
    path.write_text(json.dumps(rows))
    return folder


def process_environment(root, **variables):
    environment = {k: v for k, v in os.environ.items() if k not in ddp_launch.RANK_VARIABLES} | variables
    # one thread per process, because two processes with many threads wait for each other on few cores
    return environment | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}


def reft_train(data, root, cwd, *overrides):
    return command(root, cwd, *overrides[:1], *short_runs.arguments(data), *overrides[1:])


def command(root, cwd, *arguments, **variables):
    return subprocess.run(
        [sys.executable, "-m", "reft_lightning.cli", *arguments],
        cwd=cwd, env=process_environment(root, **variables), capture_output=True, text=True, timeout=180,
    )  # fmt: skip


COMMON = ("data.group_by_length=false", "data.validation_size=7", "optimizer.weight_decay=0.1",
          "evaluate_base=true", "data.max_length=256")  # fmt: skip


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    short_runs.run(data, folder / "one", *COMMON, "data.batch_size=6")
    return folder / "one"


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def two(request):
    """Both strategies: every rank holds the whole frozen base, or a shard of it."""
    return (f"trainer={request.param}", *TWO[1:])


@pytest.fixture(scope="module")
def both(data, one, two, tmp_path_factory, root):
    folder = tmp_path_factory.mktemp("two")
    done = reft_train(data, root, folder, *COMMON, *two, f"hydra.run.dir={folder / 'two'}")
    assert done.returncode == 0, done.stderr[-3000:]
    return one, folder / "two"


def assert_same_training(one, two):
    adapters = [load_adapter(folder / "adapter")[1] for folder in (one, two)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, atol=1e-5, rtol=0)
    losses = [short_runs.logged(folder, "train/loss") for folder in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert short_runs.results(one)["steps"] == short_runs.results(two)["steps"] == len(losses[0])


@pytest.mark.slow
def test_two_processes_train_the_adapter_of_one_with_twice_the_batch(both):
    assert_same_training(*both)
    assert short_runs.results(both[0])["steps"] == 8  # 23 train rows, 6 per step, 2 epochs


@pytest.mark.slow
def test_two_processes_that_accumulate_train_the_adapter_of_one_batch(data, one, two, tmp_path, root):
    done = reft_train(data, root, tmp_path, *COMMON, *two, f"hydra.run.dir={tmp_path / 'two'}", "data.batch_size=1",
                      "trainer.accumulate_grad_batches=3")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_training(one, tmp_path / "two")


STOP = """
import os
from lightning import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

class Stop(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 4 and os.environ.get("STOP"):
            raise SIGTERMException
"""


@pytest.mark.slow
def test_two_processes_that_were_stopped_inside_a_step_go_on_with_its_gradient(
    data, one, two, tmp_path, root
):
    (tmp_path / "stop.py").write_text(STOP)
    run = [*short_runs.arguments(data), *COMMON, *two, f"hydra.run.dir={tmp_path / 'two'}", "data.batch_size=1",
           "trainer.accumulate_grad_batches=3", "+callbacks.stop._target_=stop.Stop"]  # fmt: skip
    command(root, tmp_path, *run, STOP="1")
    checkpoint = short_runs.checkpoint(tmp_path / "two")
    assert checkpoint["global_step"] == 1
    assert checkpoint["callbacks"]["LastCheckpoint"]["gradients"]
    done = command(root, tmp_path, f"resume={tmp_path / 'two'}", "trust_code=true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_training(one, tmp_path / "two")


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
    assert found[0]["steps"] == found[2]["steps"] == 4
    assert done.returncode == 1, done.stderr[-3000:]
    assert len(list(tmp_path.rglob("results.json"))) == len(list(tmp_path.rglob(".hydra"))) == 3
    orphans, until = ["not looked yet"], time.monotonic() + 20
    while orphans and time.monotonic() < until:
        processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        orphans = [line for line in processes.splitlines() if str(tmp_path) in line]
        time.sleep(0.2)
    assert orphans == []


@pytest.mark.slow
def test_processes_with_different_numbers_of_validation_batches_do_not_wait(data, two, tmp_path, root):
    # 5 rows in batches of 1 are 3 batches in one process and 2 in the other
    done = reft_train(data, root, tmp_path, *two, "data.validation_size=5", "data.eval_batch_size=1",
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
    assert "at least one task must have 2 evaluation rows" in done.stderr


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
    assert (results["status"], results["steps"]) == ("complete", 48)  # 23 rows, 6 per step
