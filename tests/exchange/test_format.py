"""docs/format.md is right: its reader computes the library's edits, and it names every key, method and tensor."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import tiny
import torch
from adapted_models import state_of
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
    groups = reft.interventions.items()
    phis = {(int(layer), n): phi for layer, group in groups for n, phi in enumerate(group)}
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
    imported = set(re.findall(r"^(?:import|from) (\w+)", READER, re.MULTILINE))
    assert imported == {"json", "pathlib", "numpy", "safetensors"}


def test_the_page_names_every_key_method_activation_and_tensor(tmp_path):
    config, files = PAGE.split("## `reft.safetensors`")
    assert {"format", *(field.name for field in fields(rl.ReftConfig))} == set(
        re.findall(r"^\| `(\w+)` \|", config.split("## `reft_config.json`")[1], re.MULTILINE)
    )
    assert set(re.findall(r"^\| `(\w+)` \|", files, re.MULTILINE)) == set(BUILT_IN)
    ours = {name for name, cls in rl.INTERVENTIONS.items() if cls.__module__.startswith("reft_lightning.")}
    assert ours == set(BUILT_IN)
    for method in BUILT_IN:
        extra = {"add_bias": True} if method == "noreft" else {}
        settings = {"rank": 2} if method in (*LOW_RANK, *FROM_TEXTS) else {}
        reft = saved(tmp_path, method, **settings, **extra)
        names = [name.split(".", 3)[3] for name in reft.adapter_state_dict() if "interventions" in name]
        assert all(f"`{name}`" in files for name in names)
    assert all(f"`{name}`" in files for name in ACTIVATIONS)


# --- files that are not as the page says ------------------------------------------------------------------------

CONFIG, TENSORS = "reft_config.json", "reft.safetensors"
BASIS = "interventions.0.0.basis"


def values(**own):
    """Return a change of the configuration; None takes a key out."""

    def change(folder):
        held = json.loads((folder / CONFIG).read_text()) | own
        (folder / CONFIG).write_text(
            json.dumps({key: value for key, value in held.items() if value is not None})
        )

    return change


def tensors(change):
    return lambda folder: save_file(change(load_file(folder / TENSORS)), folder / TENSORS)


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


DAMAGES = {
    "truncated tensors": (cut(TENSORS, 600), TENSORS, "damaged"),
    "empty tensors": (cut(TENSORS, 0), TENSORS, "damaged"),
    "foreign tensors": (tensors(lambda t: {"norm.weight": torch.ones(16)}), "mine", "does not fit: missing"),
    "missing tensor": (tensors(lambda t: {n: v for n, v in t.items() if n != BASIS}), "mine",
                       f"missing {BASIS}, unexpected nothing"),
    "another tensor": (tensors(lambda t: t | {"stray": torch.ones(1)}), "mine", "missing nothing, unexpected stray"),
    "other shape": (tensors(lambda t: t | {BASIS: t[BASIS][:1].clone()}), "mine",
                    rf"{BASIS}: \(1, 16\) instead of \(2, 16\)"),
    "truncated config": (cut(CONFIG, 100), CONFIG, "damaged"),
    "empty config": (cut(CONFIG, 0), CONFIG, "is empty"),
    "foreign config": (lambda f: (f / CONFIG).write_text('{"model_type": "llama"}'), CONFIG, "format None"),
    "newer format": (values(format=2), CONFIG, "format 2, .* reads 1: update it"),
    "unknown key": (values(colour="red"), CONFIG, r"unknown keys \['colour'\]"),
    **{f"no {key}": (values(**{key: None}), CONFIG, f"has no {key}") for key in ("method", "layers", "positions")},
    "layers of another kind": (values(layers="x"), "mine", "layers"),
    "settings of another kind": (values(settings=3), CONFIG, "settings"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_file_that_cannot_be_read_is_named_with_the_reason_and_changes_no_model(kind, tmp_path):
    saved(tmp_path / "mine", "loreft", rank=2)
    damage, file, reason = DAMAGES[kind]
    damage(tmp_path / "mine")
    base = tiny.model("llama")
    before = state_of(base)
    with pytest.raises(ValueError, match=reason) as raised:
        rl.ReftModel.from_pretrained(base, tmp_path / "mine")
    assert file in str(raised.value)
    assert state_of(base) == before
