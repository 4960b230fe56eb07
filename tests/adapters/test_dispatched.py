"""An adapter trains on a base that accelerate has spread over devices (device_map), which stays where it is."""

import pytest
import short_runs
import tiny
import torch
from transformers import AutoModelForCausalLM

import reft_lightning as rl
from reft_lightning.base_models.dispatch import is_dispatched
from reft_lightning.runs import experiment

accelerate = pytest.importorskip("accelerate", reason="device_map is accelerate's")
# the second of three blocks is read from disk whenever it runs
DEVICES = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
           "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}  # fmt: skip
BATCH = tiny.padded(tiny.rows(6, 4), "left")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny.model("llama").save_pretrained(folder)
    return folder


def load(folder, device_map=None):
    return AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, dtype="float32")


def attach(base, **settings):
    torch.manual_seed(1)
    return rl.attach(base, "loreft", rank=2, positions="f1+l1", **settings)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_trains_as_on_a_base_in_memory(folder, checkpointing):
    found = []
    for devices in (None, DEVICES):
        base = load(folder, devices)
        assert is_dispatched(base) == (devices is not None)
        if checkpointing:
            base.gradient_checkpointing_enable()
        reft = (
            attach(base).train().to("cpu")
        )  # as a Trainer does; accelerate refuses it for the base by itself
        loss = reft(**BATCH).logits.square().mean()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in reft.interventions.parameters())])
        with torch.no_grad():
            found[-1].append(reft.eval().generate(**BATCH, max_new_tokens=4))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert base.model.layers[1].mlp.down_proj.weight.is_meta


def test_it_can_be_moved_again_once_the_adapter_is_off(folder):
    base = load(folder, DEVICES)
    reft = attach(base)
    assert "_apply" in vars(base)
    assert reft.to("meta").base_model.model.norm.weight.device.type == "cpu"
    assert {p.device.type for p in reft.interventions.parameters()} == {"meta"}
    assert "_apply" not in vars(reft.detach())


def test_a_head_that_is_offloaded_is_refused(folder):
    base = load(folder, {**DEVICES, "lm_head": "disk"})
    with pytest.raises(ValueError, match="'lm_head' is offloaded"):
        attach(base, heads=["lm_head"])


def test_a_run_on_it_is_the_run_on_a_base_in_memory(tmp_path):
    data, model = short_runs.write_rows(tmp_path / "rows"), tmp_path / "model"
    objects = short_runs.build(data)
    objects.model.detach().save_pretrained(model)
    objects.prepared.tokenizer.save_pretrained(model)
    devices = {k: v for k, v in DEVICES.items() if k != "model.layers.2"}
    devices = str(devices).replace("'", "").replace(" ", "")
    run = [
        "model=local",
        f"model.path={model}",
        "evaluate_base=true",
        "intervention.positions=l2",
        "trainer.max_epochs=1",
    ]
    expected = short_runs.run(data, tmp_path / "plain", *run)
    found = short_runs.run(data, tmp_path / "spread", *run, f"model.device_map={devices}")
    losses = [short_runs.logged(tmp_path / name, "train/loss") for name in ("spread", "plain")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert found["metrics"]["base/test/option_accuracy"] == expected["metrics"]["base/test/option_accuracy"]
    assert found["config_hash"] == expected["config_hash"]


def test_several_processes_do_not_spread_it(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "build", None)
    data = short_runs.write_rows(tmp_path / "rows")
    trainer = type("", (), {"world_size": 2, "strategy": None})
    with pytest.raises(ValueError, match="one process, but there are 2"):
        experiment.check_strategy(short_runs.config(data, "model.device_map=auto"), trainer)
