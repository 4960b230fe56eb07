"""Adapters that pyreft saved compute here what they computed there: logits, gradients, greedy texts.

Folders and numbers come from ``golden/make_pyreft_folders.py``; pyreft is not needed to run this file.
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapted_models import state_of
from golden_llama import GOLDEN, base_model
from safetensors.torch import load_file
from torch.testing import assert_close

import reft_lightning as rl
from reft_lightning.exchange.foreign import orthogonal_map
from reft_lightning.interventions import orthonormal_rows

FOLDERS = GOLDEN / "pyreft_folders"
FACTS = [json.loads((GOLDEN / f"pyreft_folders{age}.json").read_text()) for age in ("", "_older")]
CASES = FACTS[0]["cases"] | FACTS[1]["cases"]
TENSORS = {
    name: tensor
    for age in ("", "_older")
    for name, tensor in load_file(GOLDEN / f"pyreft_folders{age}.safetensors").items()
}
IDS = TENSORS["input_ids"]
MASK = (IDS != 0).long()
PROMPT = torch.arange(IDS.shape[1]) < torch.tensor(FACTS[0]["prompt_lengths"])[:, None]
LETTERS = {"W": "source.weight", "W1": "source.weight", "W2": "projection.weight", "b2": "projection.bias"}


def dtype_of(case):
    return getattr(torch, CASES[case].get("dtype", "float32"))


def read(case, **settings):
    settings = {
        "positions": CASES[case]["positions"],
        "act_fn": CASES[case].get("settings", {}).get("act_fn"),
    } | settings
    return rl.from_pyreft(base_model(dtype_of(case)), FOLDERS / case, **settings).eval()


def last_logits(model, **batch):
    logits = model(input_ids=IDS, attention_mask=MASK, **batch).logits
    return logits[torch.arange(len(IDS)), MASK.sum(-1) - 1]


def test_all_six_interventions_both_file_formats_tied_and_untied_are_among_the_cases():
    assert {case["class"] for case in CASES.values()} == {
        f"{name}Intervention" for name in ("Loreft", "Noreft", "Nodireft", "Direft", "Consreft", "Lobireft")
    }
    names = {path.name.split("#")[0] for path in FOLDERS.rglob("*.bin")}
    assert {"intkey_layer_0_comp_block_output_unit_pos_nunit_1", "intkey_layer.0.comp.block_output.unit.pos.nunit.1",
            "intkey_comp_model_layers[1]_mlp_output_unit_pos_nunit_1"} <= names  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_pyreft(case):
    reft = read(case)
    with torch.no_grad():
        logits, base = last_logits(reft, prompt_mask=PROMPT), last_logits(base_model(dtype_of(case)))
    # in bfloat16, two digits: the token that pyreft puts in front moves every position by one
    tolerance = 1e-4 if logits.dtype == torch.float32 else 0.15
    assert_close(logits, TENSORS[f"{case}/logits"], atol=tolerance, rtol=0)
    assert (logits - base).abs().max() > 2 * tolerance


@pytest.mark.parametrize("case", [name for name in CASES if dtype_of(name) == torch.float32])
def test_loss_and_gradients_are_those_of_pyreft(case):
    reft = read(case)
    labels = IDS.masked_fill(PROMPT | (MASK == 0), -100)
    loss = reft(input_ids=IDS, attention_mask=MASK, labels=labels, prompt_mask=PROMPT).loss
    loss.backward()
    assert loss.item() == pytest.approx(CASES[case]["loss"], rel=1e-5)
    phi = reft.interventions[str(CASES[case]["layers"][0])][0]
    place = f"{case}/gradients/"
    found = {name.removeprefix(place): t for name, t in TENSORS.items() if name.startswith(place)}
    assert len(found) == len(list(phi.parameters()))
    for letter, expected in found.items():
        if letter == "R":  # pyreft's gradient of R itself, carried to the free parameter that it has here
            basis = phi.basis.detach().requires_grad_()
            (expected,) = torch.autograd.grad(orthonormal_rows(basis), basis, expected)
        bias = "source.bias" if hasattr(phi, "source") else "bias"
        path = "basis" if letter == "R" else LETTERS.get(letter, bias)
        error = (phi.get_parameter(path).grad - expected).norm() / expected.norm()
        assert error < 1e-4, (letter, error)


@pytest.mark.parametrize("case", CASES)
def test_greedy_texts_are_those_of_pyreft(case):
    prompt = IDS[2:, : FACTS[0]["prompt_lengths"][2]]
    ids = read(case).generate(prompt, max_new_tokens=FACTS[0]["new_tokens"], do_sample=False)
    assert ids[0, prompt.shape[1] :].tolist() == TENSORS[f"{case}/generate"].tolist()


def test_reading_takes_no_random_numbers():
    model = base_model()
    state = torch.get_rng_state()
    rl.from_pyreft(model, FOLDERS / "loreft_tied", positions="f1")
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_read_is_what_was_trained():
    reft = read("consreft_ranks")
    assert [len(group[0].bias) for group in reft.interventions.values()] == [2, 4]
    assert read("loreft_untied_relu").config.tied == "group"
    assert read("loreft_bfloat16").config.settings["weight_dtype"] == "bfloat16"
    assert read("noreft_bias_gelu").config.settings["add_bias"]
    assert read("loreft_module_path").sites["1"].path == "model.layers.1.mlp"
    assert read("loreft_tied", dropout=0.1).config.settings["dropout_on"] == "output"
    assert all(reft.config.clip == "floor" for reft in map(read, CASES))


@pytest.mark.parametrize("shape", [(12, 3), (12, 1), (5, 5)])
def test_the_orthogonal_map_of_torch_is_computed_from_what_it_saves(shape):
    torch.manual_seed(0)
    layer: Any = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(shape[1], shape[0], bias=False))
    saved = layer.parametrizations.weight
    with torch.no_grad():
        saved.original.add_(torch.randn(shape).tril(-1))
    assert_close(orthogonal_map(saved.original, saved[0].base), layer.weight.detach(), atol=1e-6, rtol=0)


# --- what cannot be read ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(FOLDERS / "loreft_tied", tmp_path / "theirs"))


FIRST = "intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin"


class Code:
    def __reduce__(self):
        return (print, ("run",))


def config(**own):
    def change(folder):
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | own))

    return change


def representation(index, value, file=None):
    """Change an entry of the first representation, and the name of its file."""

    def change(folder):
        rows = json.loads((folder / "config.json").read_text())["representations"]
        rows[0][index] = value
        config(representations=rows)(folder)
        if file is not None:
            (folder / FIRST).rename(folder / file)

    return change


def state(change):
    return lambda folder: torch.save(change(torch.load(folder / FIRST, weights_only=True)), folder / FIRST)


def content(bytes_, name=FIRST):
    return lambda folder: (folder / name).write_bytes(bytes_)


LOREFT, CODE = "<class 'pyreft.interventions.LoreftIntervention'>", {"weight": Code()}
DAMAGES = {
    "code": (content(pickle.dumps(CODE, protocol=2)), FIRST, "could run code"),
    "code in torch's file": (state(lambda t: CODE), FIRST, "could run code"),
    "truncated": (lambda f: (f / FIRST).write_bytes((f / FIRST).read_bytes()[:1500]), FIRST, "damaged"),
    "empty": (content(b""), FIRST, "damaged"),
    "text": (content(b"weights"), FIRST, "damaged"),
    "a list": (state(lambda t: [torch.zeros(1)]), FIRST, "tensors by name; got a list"),
    "missing tensor": (state(lambda t: {k: v for k, v in t.items() if k != "rotate_layer"}), FIRST,
                       "needs rotate_layer, which is missing; it has bias, weight"),
    "flat tensor": (state(lambda t: t | {"weight": t["weight"].flatten()}), FIRST,
                    r"weight of LoreftIntervention must have 2 .* shape \(128,\)"),
    "missing file": (lambda f: (f / FIRST).unlink(), FIRST, "is missing"),
    "other width": (state(lambda t: t | {"weight": torch.zeros(4, 48)}), "theirs",
                    r"source.weight: \(4, 48\) instead of \(4, 32\)"),
    "nan": (state(lambda t: t | {"bias": torch.full((4,), torch.nan)}), "theirs", "NaN or infinite"),
    "integer weights": (state(lambda t: t | {"bias": torch.zeros(4, dtype=torch.int8)}), "theirs", "integer weights"),
    "other depth": (representation(0, 7, FIRST.replace("_0_", "_7_")), "theirs", r"layer must lie in 0\.\.2.*got 7"),
    "empty config": (content(b"", "config.json"), "config.json", "is empty"),
    "foreign config": (content(b'{"model_type": "llama"}', "config.json"), "config.json", "is not from pyreft"),
    "no entries": (config(representations=[]), "config.json", "is not from pyreft"),
    "fewer types": (config(intervention_types=[LOREFT]), "config.json", "2 representations, but 1 intervention_types"),
    "other class": (config(intervention_types=["<class 'subprocess.Popen'>"] * 2), "config.json",
                    "an unknown intervention Popen; pyreft's are Loreft"),
    "strange entry": (config(representations=["x", "y"]), "config.json", "a representation must be .*; got 'x'"),
    "heads": (representation(2, "h.pos"), "config.json", r"pyvene's unit h\.pos"),
    "linked": (representation(9, 0), "config.json", "pyvene's intervention_link_key"),
    "component": (representation(1, "query_output", FIRST.replace("block", "query")), "config.json",
                  "pyvene's component 'query_output' has no counterpart"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_file_that_cannot_be_read_is_named_with_the_reason_and_changes_no_model(kind, folder, capsys):
    damage, file, reason = DAMAGES[kind]
    damage(folder)
    capsys.readouterr()
    base = base_model()
    before, weights = state_of(base), {name: t.clone() for name, t in base.state_dict().items()}
    with pytest.raises(ValueError, match=reason) as raised:
        rl.from_pyreft(base, folder, positions="f2+l3")
    assert file in str(raised.value)
    assert capsys.readouterr().out == ""  # nothing of the file was run
    assert state_of(base) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base.state_dict().items())


def test_another_model_is_refused_and_stays_as_it_was():
    for family in ("llama", "bert"):
        base = tiny.model(family)
        before = state_of(base)
        with pytest.raises(ValueError, match=r"loreft_tied.*instead of \(4, 16\)"):
            rl.from_pyreft(base, FOLDERS / "loreft_tied", positions="f2+l3")
        assert state_of(base) == before


def test_a_folder_without_pyrefts_files_says_what_is_there(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"config.json is missing; it has notes.txt"):
        rl.from_pyreft(base_model(), tmp_path, positions="f1")


def test_positions_are_asked_for_because_pyreft_does_not_save_them(folder):
    with pytest.raises(ValueError, match=r"theirs: pyreft does not save positions: .*positions='f7\+l7'"):
        rl.from_pyreft(base_model(), folder)
    with pytest.raises(ValueError, match=r"one intervention for the prefix.*got 'l3'"):
        read("noreft_untied", positions="l3")
    with pytest.raises(ValueError, match=r"act_fn must be one of .*got 'laplace'"):
        rl.from_pyreft(base_model(), folder, positions="f2+l3", act_fn="laplace")


def test_trained_heads_of_pyreft_are_read(folder):
    head = torch.randn(64, 32)
    torch.save({"lm_head.weight": head}, folder / "pytorch_model.bin")
    base = base_model()
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
    reft = rl.from_pyreft(base, folder, positions="f2+l3")
    assert torch.equal(reft.base_model.lm_head.weight, head)
    assert reft.config.heads == ["lm_head"]
    torch.save({}, folder / "pytorch_model.bin")  # as its trainer writes it where nothing else was trained
    assert rl.from_pyreft(base_model(), folder, positions="f2+l3").config.heads == []
