"""Adapters that AdapterHub's adapters saved compute here what they computed there.

Folders and numbers come from ``golden/make_adapters_folders.py``; adapters is not needed to run this file.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from adapted_models import state_of
from golden_llama import GOLDEN, base_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import reft_lightning as rl

FOLDERS = GOLDEN / "adapters_folders"
TENSORS = load_file(GOLDEN / "adapters_folders.safetensors")
IDS = TENSORS["input_ids"]
MASK = (IDS != 0).long()
CASES = sorted(path.name for path in FOLDERS.iterdir())
NAMES = {
    "learned_source.weight": "source.weight",
    "learned_source.bias": "source.bias",
    "projection.weight": "projection.weight",
}


def method_of(case):
    return None if case.startswith("loreft") else case


def read(case):
    return rl.from_adapters(base_model(), FOLDERS / case, method=method_of(case)).eval()


def last_logits(model):
    logits = model(input_ids=IDS, attention_mask=MASK).logits
    return logits[torch.arange(len(IDS)), MASK.sum(-1) - 1]


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_adapters(case):
    reft = read(case)
    logits = last_logits(reft)
    assert_close(logits, TENSORS[f"{case}/logits"], atol=1e-4, rtol=0)
    assert (logits - last_logits(base_model())).abs().max() > 0.1
    logits.mean().backward()
    phi = next(iter(reft.interventions.values()))[0]
    for name, path in NAMES.items():
        expected = TENSORS.get(f"{case}/gradients/{name}")
        if expected is not None:
            assert (phi.get_parameter(path).grad - expected).norm() < 1e-4 * expected.norm()


def test_reading_takes_no_random_numbers():
    model = base_model()
    state = torch.get_rng_state()
    rl.from_adapters(model, FOLDERS / CASES[0], method=method_of(CASES[0]))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_read_is_what_was_trained():
    config = read("loreft_both_ends_relu").config
    assert (config.method, config.layers, config.positions, config.tied) == ("loreft", [1], "f2+l3", "group")
    assert config.settings == {"rank": 4, "act_fn": "relu", "dropout": 0.05, "dropout_on": "output"}
    assert read("loreft_tied").config.tied == "all"
    reft = read("loreft")  # whose second unit there has no positions
    assert (reft.config.positions, [len(group) for group in reft.interventions.values()]) == ("f3", [1, 1])


def test_noreft_or_direft_is_asked_as_adapters_does_not_save_it():
    with pytest.raises(ValueError, match=r"noreft.*method='noreft' or method='direft'; got None"):
        rl.from_adapters(base_model(), FOLDERS / "noreft")
    with pytest.raises(ValueError, match=r"is a LoReFT adapter .*; got method='direft'"):
        rl.from_adapters(base_model(), FOLDERS / "loreft", method="direft")


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(FOLDERS / "loreft_tied", tmp_path / "theirs"))


UNIT = "model.layers.0.reft_layer.refts.mine.units.0"


CONFIG, TENSORS_FILE, HEAD = "adapter_config.json", "adapter.safetensors", "model_head.safetensors"


def config(**own):
    def change(folder):
        values = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(values | {"config": {**values["config"], **own}}))

    return change


def text(content):
    return lambda folder: (folder / CONFIG).write_text(content)


def tensors(change):
    return lambda folder: save_file(change(load_file(folder / TENSORS_FILE)), folder / TENSORS_FILE)


def cut(size):
    return lambda folder: (folder / TENSORS_FILE).write_bytes((folder / TENSORS_FILE).read_bytes()[:size])


def without(name):
    return tensors(lambda state: {key: t for key, t in state.items() if key != name})


YOURS = UNIT.replace("mine", "yours") + ".learned_source.bias"
DAMAGES = {
    "truncated": (cut(500), TENSORS_FILE, "damaged"),
    "empty": (cut(0), TENSORS_FILE, "damaged"),
    "missing tensor": (without(f"{UNIT}.learned_source.bias"), TENSORS_FILE,
                       r"unit 0 of layer 0 needs learned_source\.bias"),
    "missing unit": (config(tied_weights=False), TENSORS_FILE, "layer 0 has no unit 1"),
    "two adapters": (tensors(lambda t: t | {YOURS: torch.zeros(2)}), TENSORS_FILE, "got mine, yours at model.layers"),
    "of LoRA": (config(architecture="lora"), CONFIG, "'lora' instead of 'reft'"),
    "foreign tensors": (tensors(lambda t: {"model.layers.0.mlp.weight": torch.zeros(2)}), TENSORS_FILE,
                        r"contains model\.layers\.0\.mlp\.weight, which does not belong"),
    "other width": (tensors(lambda t: t | {f"{UNIT}.learned_source.weight": torch.zeros(2, 48)}), "theirs",
                    r"source.weight: \(2, 48\) instead of \(2, 32\)"),
    "other depth": (tensors(lambda t: {n.replace("layers.2", "layers.7"): v for n, v in t.items()}), "theirs",
                    "layer must lie in"),
    "no positions": (config(prefix_positions=0, suffix_positions=0), CONFIG, "has no positions"),
    "no rank": (text(json.dumps({"config": {"architecture": "reft"}})), CONFIG, "config has no orthogonality"),
    "config of no kind": (text("[]"), CONFIG, "contains a list"),
    "foreign config": (text('{"peft_type": "LORA"}'), CONFIG, "is not a ReFT adapter"),
    "head of its own": (lambda f: save_file({"heads.mine.1.weight": torch.zeros(2, 2)}, f / HEAD), HEAD,
                        r"LlamaForCausalLM does not have \(heads\.mine"),
    "activation": (config(non_linearity="laplace"), "theirs", "act_fn must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_file_that_cannot_be_read_is_named_with_the_reason_and_changes_no_model(kind, folder):
    damage, file, reason = DAMAGES[kind]
    damage(folder)
    base = base_model()
    before = state_of(base)
    with pytest.raises(ValueError, match=reason) as raised:
        rl.from_adapters(base, folder)
    assert file in str(raised.value)
    assert state_of(base) == before


def test_a_folder_without_its_files_says_what_is_missing(folder):
    (folder / "adapter.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter\.safetensors or pytorch_adapter\.bin is missing"):
        rl.from_adapters(base_model(), folder)


def test_a_trained_head_is_read_with_the_adapter(tmp_path):
    base = tiny.model("roberta")
    name = "roberta.encoder.layer.1.reft_layer.refts.mine.units.0."
    shapes = {"learned_source.weight": (2, 16), "learned_source.bias": (2,), "projection.weight": (2, 16)}
    tensors = {name + key: torch.randn(shape) for key, shape in shapes.items()}
    save_file(tensors, tmp_path / "adapter.safetensors")
    config = {
        "architecture": "reft",
        "orthogonality": False,
        "prefix_positions": 1,
        "suffix_positions": 0,
        "r": 2,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps({"config": config}))
    head = {key: tensor.clone() for key, tensor in base.state_dict().items() if key.startswith("classifier")}
    trained = torch.randn_like(head["classifier.out_proj.weight"])
    save_file(head | {"classifier.out_proj.weight": trained}, tmp_path / "model_head.safetensors")
    reft = rl.from_adapters(base, tmp_path, method="direft")
    assert not any(module.training for module in reft.modules())
    assert torch.equal(reft.base_model.classifier.out_proj.weight, trained)
    assert reft.config.heads == ["classifier.out_proj"]
