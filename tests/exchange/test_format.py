"""docs/format.md is right: its reader gives the library's edits, and it names every key, method and tensor."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import reft_lightning as rl
from reft_lightning.interventions import Tokens
from reft_lightning.interventions.subspace import ACTIVATIONS

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
(READER,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
LOW_RANK = ["loreft", "direft_orthonormal", "noreft", "direft", "consreft", "lobireft"]
FROM_TEXTS = ["das", "boundless_das", "cdas"]
BUILT_IN = [
    *LOW_RANK, *FROM_TEXTS, "red", "bias", "difference_in_means", "activation_scaling", "cast", "reft_r1", "lofit",
    "jola",
]  # fmt: skip
CASES = [
    *((method, {"rank": 2} if method in (*LOW_RANK, *FROM_TEXTS) else {}) for method in BUILT_IN),
    ("boundless_das", {}),
    ("cast", {"threshold": 0.9, "below": True}),
    ("reft_r1", {"top_k": 2}),
    ("lofit", {"stage": "scale", "component": "head_output", "tied": "all"}),
    ("loreft", {"rank": 2, "act_fn": "relu", "layers": {0: {}, 1: {"act_fn": "tanh"}, 2: {"method": "noreft"}}}),
    ("noreft", {"rank": 2, "act_fn": "silu", "add_bias": True}),
    ("direft", {"rank": 2, "act_fn": "sigmoid", "tied": "position"}),
]  # fmt: skip


def saved(folder, method, **settings):
    torch.manual_seed(5)
    reft = rl.attach(
        tiny.model("llama"), method, **({"positions": "f1+l2", "tied": "group"} | settings)
    ).eval()
    with torch.no_grad():
        for parameter in reft.interventions.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    reft.scale = 0.5
    reft.save_pretrained(folder)
    return reft


@pytest.mark.parametrize(("method", "settings"), CASES)
def test_the_reader_of_the_page_computes_what_the_library_does(method, settings, tmp_path):
    reft = saved(tmp_path, method, **settings)
    names = {}
    exec(READER, names)
    found, scale = names["read"](tmp_path)
    phis = {
        (int(layer), n): phi for layer, group in reft.interventions.items() for n, phi in enumerate(group)
    }
    assert found.keys() == phis.keys()
    for key, phi in phis.items():
        h = 3 * torch.randn(12, phi.dim)
        where, others = Tokens.alone(h), {}
        if phi.takes_source:
            states = torch.randn(1, 12, phi.dim)
            where.source = states, torch.tensor([12])
            others["source"] = (states[0, -1:] if phi.takes_source == "last" else states[0]).numpy()
        ours = phi(h, reft.scale, where).detach()
        theirs = torch.from_numpy(names["edited"](h.numpy(), *found[key], scale, **others)).to(ours)
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
        assert (ours - h).abs().max() > 0.05


def test_the_reader_is_short_and_needs_numpy_and_safetensors_only():
    assert len(READER.splitlines()) <= 68
    assert set(re.findall(r"^(?:import|from) (\w+)", READER, re.MULTILINE)) == {
        "json",
        "pathlib",
        "numpy",
        "safetensors",
    }


def test_the_page_names_every_key_method_activation_and_tensor(tmp_path):
    config, files = PAGE.split("## `reft.safetensors`")
    assert {"format", *(field.name for field in fields(rl.ReftConfig))} == set(
        re.findall(r"^\| `(\w+)` \|", config.split("## `reft_config.json`")[1], re.MULTILINE)
    )
    assert set(re.findall(r"^\| `(\w+)` \|", files, re.MULTILINE)) == set(BUILT_IN)
    assert {
        name for name, cls in rl.INTERVENTIONS.items() if cls.__module__.startswith("reft_lightning.")
    } == set(BUILT_IN)
    for method in BUILT_IN:
        extra = {"add_bias": True} if method == "noreft" else {}
        settings = {"rank": 2} if method in (*LOW_RANK, *FROM_TEXTS) else {}
        reft = saved(tmp_path, method, **settings, **extra)
        assert all(
            f"`{n.split('.', 3)[3]}`" in files for n in reft.adapter_state_dict() if "interventions" in n
        )
    assert all(f"`{name}`" in files for name in ACTIVATIONS)


# --- files that are not as the page says ------------------------------------------------------------------------

CONFIG, TENSORS = "reft_config.json", "reft.safetensors"
BASIS = "interventions.0.0.basis"


def damage(folder, kind):
    config, tensors = folder / CONFIG, folder / TENSORS
    values, state = json.loads(config.read_text()), load_file(tensors)
    match kind:
        case "truncated tensors":
            tensors.write_bytes(tensors.read_bytes()[:600])
        case "empty tensors":
            tensors.write_bytes(b"")
        case "foreign tensors":
            save_file({"model.norm.weight": torch.ones(16)}, tensors)
        case "missing tensor":
            save_file({name: t for name, t in state.items() if name != BASIS}, tensors)
        case "truncated config":
            config.write_text(config.read_text()[:100])
        case "empty config":
            config.write_text("")
        case "foreign config":
            config.write_text('{"model_type": "llama"}')
        case "newer format":
            config.write_text(json.dumps(values | {"format": 2}))
        case "no method":
            config.write_text(json.dumps({key: v for key, v in values.items() if key != "method"}))
        case "no layers":
            config.write_text(json.dumps({key: v for key, v in values.items() if key != "layers"}))
        case "layers of another kind":
            config.write_text(json.dumps(values | {"layers": "x"}))
        case "settings of another kind":
            config.write_text(json.dumps(values | {"settings": 3}))


DAMAGES = {
    "truncated tensors": (TENSORS, "damaged"),
    "empty tensors": (TENSORS, "damaged"),
    "foreign tensors": ("mine", "does not fit: missing"),
    "missing tensor": ("mine", f"missing {BASIS}, unexpected nothing"),
    "truncated config": (CONFIG, "damaged"),
    "empty config": (CONFIG, "is empty"),
    "foreign config": (CONFIG, "format None"),
    "newer format": (CONFIG, "format 2, .* reads 1: update it"),
    "no method": (CONFIG, "method"),
    "no layers": (CONFIG, "layers"),
    "layers of another kind": ("mine", "layers"),
    "settings of another kind": (CONFIG, "settings"),
}


def state_of(model):
    return [(name, len(m._forward_hooks), sorted(vars(m))) for name, m in model.named_modules()]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_file_that_cannot_be_read_is_named_with_the_reason_and_changes_no_model(kind, tmp_path):
    saved(tmp_path / "mine", "loreft", rank=2)
    damage(tmp_path / "mine", kind)
    base = tiny.model("llama")
    before = state_of(base)
    file, reason = DAMAGES[kind]
    with pytest.raises(ValueError, match=reason) as raised:
        rl.ReftModel.from_pretrained(base, tmp_path / "mine")
    assert file in str(raised.value)
    assert state_of(base) == before
    assert all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 32, "head_dim": 16}, "width 32 instead of 16"),
        ({"num_hidden_layers": 2}, "layers 2 instead of 3"),
        ({"family": "mistral"}, "type 'mistral' instead of 'llama'"),
    ],
)
def test_another_model_is_refused_with_what_differs_and_stays_as_it_was(change, said, tmp_path):
    from transformers import AutoModelForCausalLM

    saved(tmp_path / "mine", "loreft", rank=2)
    family = change.pop("family", "llama")
    base = AutoModelForCausalLM.from_config(tiny.FAMILIES[family](**change))
    before = state_of(base)
    with pytest.raises(ValueError, match=said) as raised:
        rl.ReftModel.from_pretrained(base, tmp_path / "mine")
    assert "mine" in str(raised.value)
    assert state_of(base) == before
