"""What to_easysteer writes edits tokens as the adapter does, by the formula of EasySteer's loreft algorithm.

That EasySteer's own classes accept it is recorded in ``experiments/exchange``.
"""

import base64
import hashlib
import json

import numpy as np
import pytest
import tiny
import torch

import reft_lightning as rl

METHODS = ["loreft", "noreft", "direft", "direft_orthonormal", "consreft", "lobireft"]


def attached(method="loreft", **settings):
    torch.manual_seed(3)
    reft = rl.attach(tiny.model("llama"), method, **({"rank": 2, "positions": "f1+l2"} | settings)).eval()
    with torch.no_grad():
        for parameter in reft.interventions.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return reft


def written(reft, folder):
    rl.to_easysteer(reft, folder)
    return json.loads((folder / "steering.json").read_text())


def array(entry):
    return np.frombuffer(base64.b64decode(entry["data"]), dtype=np.float32).reshape(entry["shape"])


def steered(vector, h):
    """EasySteer's loreft: h + scale * (h W' + b - h R) R', with R (d, r)."""
    R, W, b = (
        array(vector["data"]["tensors"][name])
        for name in ("rotate_layer", "learned_source_weight", "learned_source_bias")
    )
    return h + vector["scale"] * (h @ W.T + b - h @ R) @ R.T


@pytest.mark.parametrize("method", METHODS)
def test_a_vector_edits_as_its_intervention_does(method, tmp_path):
    reft = attached(method, layers=[0, 2], tied="group")
    reft.scale = 0.5
    vectors = written(reft, tmp_path)["vectors"]
    h = torch.randn(5, tiny.WIDTH)
    phis = [(int(layer), phi) for layer, group in reft.interventions.items() for phi in group]
    assert [vector["layers"] for vector in vectors] == [[layer] for layer, _ in phis]
    for vector, (layer, phi) in zip(vectors, phis, strict=True):
        assert vector["data"]["extra"]["layer"] == layer
        np.testing.assert_allclose(steered(vector, h.numpy()), phi(h, 0.5).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("positions", "clause"),
    [
        ("f3", {"prompt_window": [0, 3]}),
        ("l2", {"prompt_positions": [-2, -1]}),
        ("f1+l2", {"prompt_window": [0, 1], "prompt_positions": [-2, -1]}),
        ("prompt", {"prompt": "all"}),
        ("prompt+decode:4", {"prompt": "all", "generation_window": [0, 4]}),
        ("decode", {"generation": "all"}),
        ("all", {"prompt": "all", "generation": "all"}),
    ],
)
def test_positions_are_written_as_its_clauses(positions, clause, tmp_path):
    (vector,) = written(attached(layers=[1], positions=positions), tmp_path)["vectors"]
    assert vector["apply"] == clause


def test_prefix_and_suffix_have_a_clause_each_where_they_have_an_intervention_each(tmp_path):
    vectors = written(attached(layers=[1], tied="group"), tmp_path)["vectors"]
    clauses = [vector["apply"] for vector in vectors]
    assert clauses == [{"prompt_window": [0, 1]}, {"prompt_positions": [-2, -1]}]


def test_the_digest_is_of_kind_names_shapes_bytes_and_layer(tmp_path):
    payload = written(attached(layers=[1]), tmp_path)["vectors"][0]["data"]
    text = b"reft:1"
    for name, entry in sorted(payload["tensors"].items()):
        text += name.encode() + str(tuple(entry["shape"])).encode() + base64.b64decode(entry["data"])
    assert payload["sha256"] == hashlib.sha256(text + b"layer=1").hexdigest()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"component": "mlp_output"}, "layer 0: EasySteer edits only the output of blocks; got 'mlp_output'"),
        ({"act_fn": "relu"}, "act_fn='relu' is not an affine function"),
        ({"method": "red", "rank": None}, r"layer 0: 'red' does not have the form U'\(V h \+ c\)"),
        (
            {"method": "das", "positions": "l1"},
            "layer 0: 'das' does not have the form",
        ),  # low-rank, of another text's h
        ({"tied": "position"}, "layer 0: tied='position'"),
        ({"positions": lambda prompt, target: prompt}, "does not support a position function"),
        ({"heads": ["lm_head"]}, r"this adapter trained \['lm_head'\]"),
        ({"method": "none", "heads": ["lm_head"]}, "no interventions"),
    ],
)
def test_what_easysteer_does_not_have_is_refused_before_anything_is_written(settings, said, tmp_path):
    settings = {"method": "loreft", "rank": 2} | settings
    reft = rl.attach(tiny.model("llama"), **{k: v for k, v in settings.items() if v is not None})
    with pytest.raises(ValueError, match=said):
        rl.to_easysteer(reft, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_diverged_adapter_is_not_written(tmp_path):
    reft = rl.attach(tiny.model("llama"), rank=2, positions="l2")
    with torch.no_grad():
        reft.interventions["1"][0].source.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        rl.to_easysteer(reft, tmp_path / "out")
    assert not (tmp_path / "out").exists()
