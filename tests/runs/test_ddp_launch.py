"""Runs under DDP leave nothing behind for the next; jobs of a sweep under DDP run in their own processes."""

import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from reft_lightning.runs import ddp_launch, own_process


def test_the_environment_is_restored_also_when_a_run_fails(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")  # as a cluster sets it
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with suppress(RuntimeError), ddp_launch.leaving_no_ranks():
        os.environ.update(LOCAL_RANK="0", WORLD_SIZE="2")
        raise RuntimeError("out of memory")
    assert "LOCAL_RANK" not in os.environ
    assert os.environ["WORLD_SIZE"] == "4"


def test_a_job_of_its_own_gets_its_overrides_and_not_the_sweeps(monkeypatch):
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    overrides = {
        "task": ["seed=2", "launcher=joblib", "name=a b"],
        "hydra": ["hydra.mode=MULTIRUN", "hydra/launcher=joblib", "hydra.verbose=true"],
    }
    monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.create({"hydra": {"overrides": overrides}}))
    found = own_process.job_arguments(["-m", "seed=1,2", "name=a b", "--config-dir", "mine"])
    assert found == ["--config-dir", "mine", "seed=2", "name=a b", "hydra.verbose=true"]


@pytest.mark.parametrize(
    ("devices", "nodes", "needed"),
    [
        (1, 1, False),
        ("1", 1, False),
        ([3], 1, False),
        (2, 1, True),
        ([0, 1], 1, True),
        (-1, 1, True),
        (1, 2, True),
    ],
)
def test_only_a_job_that_starts_ranks_needs_a_process(monkeypatch, devices, nodes, needed):
    for name in ddp_launch.RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert own_process.needs_own_process(devices, nodes) == needed
    monkeypatch.setenv("LOCAL_RANK", "0")  # torchrun has started them
    assert not own_process.needs_own_process(devices, nodes)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_to_stop_reaches_the_job_as_sigterm(number):
    code = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(143)); print(1, flush=True)\n"
        "for _ in range(1200): time.sleep(0.05)"  # Python may miss a signal just before a long sleep
    )
    before = signal.signal(signal.SIGUSR2, lambda *_: None)  # as submitit's, which is called later
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    handler = signal.getsignal(number)
    with own_process._passed_on(lambda: process) as (_, told):
        process.stdout.readline()
        os.kill(os.getpid(), number)
        assert process.wait(30) == 143
    process.stdout.close()
    assert told == [number]
    assert signal.getsignal(number) == handler
    signal.signal(signal.SIGUSR2, before)
