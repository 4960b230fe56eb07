"""A frozen base sharded across ranks (trainer=fsdp): test_ddp.py has the runs, this file has gradients and errors."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import short_runs

from reft_lightning.config.schema import InterventionConfig
from reft_lightning.runs import experiment
from reft_lightning.runs.ddp_launch import RANK_VARIABLES

# Each of two processes computes the gradients of its rows in float64, and compares their mean with those of all rows.
GRADIENTS = """
import copy, torch, torch.distributed as dist
import tiny
from torch.distributed.tensor import DTensor
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from reft_lightning.adapters.adapt import adapt
from reft_lightning.training.sharded_base import shard

cases = {
    "loreft": ("llama", {"rank": 2, "positions": "f2+l2"}),
    "loreft at an input": ("llama", {"rank": 2, "positions": "all", "component": "block_input"}),
    "loreft inside a block": ("gpt2", {"rank": 2, "positions": "l2", "component": "mlp_output"}),
    "loreft and the output head": ("gpt2", {"rank": 2, "positions": "l2", "heads": ["lm_head"]}),
    "lora": ("llama", {"method": "peft/lora"}),
    "loreft and lora": ("llama", {"rank": 2, "positions": "l2", "beside": "peft/lora"}),
    "bitfit": ("gpt2", {"method": "bitfit"}),
    "loreft and a classifier": ("roberta", {"rank": 2, "positions": "all"}),
    "loreft and checkpointing": ("llama", {"rank": 2, "positions": "all"}),
}

def compare(rank):
    dist.init_process_group("gloo", "file://" + __file__ + ".store", rank=rank, world_size=2)
    for name, (family, settings) in cases.items():
        base = tiny.model(family).double()
        if "checkpointing" in name:
            base.gradient_checkpointing_enable()
            base.train()
        torch.manual_seed(0)
        whole = adapt(base, **settings).double()
        with torch.no_grad():
            for p in whole.parameters():
                if p.requires_grad: p.add_(0.1 * torch.randn_like(p))
        divided = copy.deepcopy(whole)
        ids = torch.randint(3, tiny.VOCABULARY, (4, 9))
        labels = torch.tensor([0, 1, 1, 0]) if family == "roberta" else ids.masked_fill(torch.arange(9) < 6, -100)
        def inputs(rows):
            return {"input_ids": ids[rows], "attention_mask": torch.ones_like(ids[rows]), "labels": labels[rows]}
        whole(**inputs(slice(None))).loss.backward()
        shard(divided.base_model, torch.device("cpu"), 2)
        parts = [(p.to_local().numel(), p.numel()) for p in divided.parameters() if isinstance(p, DTensor)]
        assert sum(part for part, _ in parts) < 0.6 * sum(all for _, all in parts), name
        divided._ddp_params_and_buffers_to_ignore = [n for n, p in divided.named_parameters() if isinstance(p, DTensor)]
        ddp = DistributedDataParallel(divided)  # gradients are averaged as long as it is there
        ddp(**inputs(slice(rank, None, 2))).loss.backward()
        trained = {n: p.grad for n, p in divided.named_parameters() if p.requires_grad}
        expected = {n: p.grad for n, p in whole.named_parameters() if p.requires_grad}
        assert trained.keys() == expected.keys() and trained, name
        for n, gradient in trained.items():
            torch.testing.assert_close(gradient, expected[n], rtol=1e-9, atol=1e-11, msg=lambda m: f"{name} {n}: {m}")
        with torch.no_grad(), divided.disabled(), whole.disabled():
            torch.testing.assert_close(divided(**inputs(slice(None))).logits, whole(**inputs(slice(None))).logits)
        print("equal:", name, flush=True)
    dist.destroy_process_group()

start_processes(compare, nprocs=2, start_method="fork")  # what is imported is imported once
"""


def test_gradients_are_those_of_one_process_with_all_rows(root, tmp_path):
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
    environment |= {"PYTHONPATH": f"{root}:{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "gradients.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal:") == 2 * 9


def test_a_single_process_trains_what_it_trains_without(data, tmp_path):
    short_runs.run(data, tmp_path / "plain", "evaluate_base=true")
    short_runs.run(data, tmp_path / "fsdp", "evaluate_base=true", "trainer=fsdp", "trainer.devices=1")
    assert short_runs.logged(tmp_path / "fsdp", "train/loss") == short_runs.logged(
        tmp_path / "plain", "train/loss"
    )
    found, expected = (short_runs.results(tmp_path / name)["metrics"] for name in ("fsdp", "plain"))
    assert {k: v for k, v in found.items() if "second" not in k} == {
        k: v for k, v in expected.items() if "second" not in k
    }


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.compile=true"], "model.compile has not been tested"),
        (
            ["trainer.strategy._target_=lightning.pytorch.strategies.ModelParallelStrategy"],
            "Write trainer=fsdp",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused_before_weights_are_loaded(
    data, tmp_path, monkeypatch, overrides, said
):
    monkeypatch.setattr(experiment, "build", None)
    with pytest.raises(experiment.SetupError, match=said):
        short_runs.run(data, tmp_path / "run", "trainer=fsdp", "trainer.devices=1", *overrides)


def test_a_base_that_is_trained_cannot_be_divided(data, tmp_path):
    divided = short_runs.config(data, "trainer=fsdp", "trainer.devices=1")
    with pytest.raises(experiment.SetupError, match="full trains the base's weights"):
        experiment.run(replace(divided, intervention=InterventionConfig(method="full")), tmp_path / "full")


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_3_offload"])
def test_lightnings_own_are_refused_by_name(tmp_path, strategy):
    with pytest.raises(
        ValueError, match=f"trainer.strategy={strategy} would also shard .* Write trainer=fsdp"
    ):
        short_runs.config(tmp_path, f"trainer.strategy={strategy}")
