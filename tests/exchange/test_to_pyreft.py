"""What to_pyreft writes is in pyreft's format, and comes back as it went.

That pyreft itself loads it and gives the same logits is recorded in ``experiments/exchange``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from golden_llama import base_model
from torch.testing import assert_close

import reft_lightning as rl
from reft_lightning.exchange.foreign import orthogonal_map
from reft_lightning.exchange.pyreft import BUFFER, PARAMETER

FOLDERS = Path(__file__).parents[1] / "golden" / "pyreft_folders"
METHODS = ["loreft", "noreft", "direft", "direft_orthonormal", "consreft", "lobireft"]
# the case of the golden folders that pyreft wrote with the same class
THEIRS = {
    "loreft": "loreft_tied",
    "noreft": "noreft_untied",
    "direft": "nodireft_untied",
    "direft_orthonormal": "direft_tied",
    "consreft": "consreft_ranks",
    "lobireft": "lobireft_untied",
}
ROWS = tiny.padded(tiny.rows(5, 3), "left")


def attached(method="loreft", family="llama", **settings):
    torch.manual_seed(3)
    reft = rl.attach(tiny.model(family), method, **({"rank": 2, "positions": "f1+l2"} | settings)).eval()
    with torch.no_grad():
        for parameter in reft.interventions.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return reft


def logits(reft):
    with torch.no_grad():
        return reft(**ROWS).logits


def files(folder):
    return {path.name: torch.load(path, weights_only=True) for path in Path(folder).glob("*.bin")}


def kinds(state):
    return {name: (tensor.ndim, tensor.dtype) for name, tensor in state.items()}


def assert_same(again, reft, exact):
    """Equal to the bit, but for R: pyreft keeps R, and here its free parameter is kept, from which R is computed."""
    ours, theirs = reft.adapter_state_dict(), again.adapter_state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if not name.endswith("basis"))
    for mine, other in zip(reft.interventions.values(), again.interventions.values(), strict=True):
        for one, two in zip(mine, other, strict=True):
            if one.rotations:
                assert_close(one.R, two.R, atol=2e-7, rtol=0)
    if exact:
        assert torch.equal(logits(again), logits(reft))
    else:
        assert_close(logits(again), logits(reft), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("method", "tied"), [("loreft", "all"), *((method, "group") for method in METHODS)])
def test_what_is_written_comes_back(method, tied, tmp_path):
    reft = attached(method, tied=tied, dropout=0.1)
    rl.to_pyreft(reft, tmp_path)
    again = rl.from_pyreft(tiny.model("llama"), tmp_path)
    assert not any(module.training for module in again.modules())
    assert again.config == reft.config
    assert_same(again, reft, exact=method in ("noreft", "direft"))
    # as pyreft reads it, which knows nothing of our key
    config = json.loads((tmp_path / "config.json").read_text())
    del config["reft_lightning"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    plain = rl.from_pyreft(tiny.model("llama"), tmp_path, positions="f1+l2")
    assert not any(module.training for module in plain.modules())
    assert plain.config.tied == tied
    assert all(torch.equal(t, plain.adapter_state_dict()[n]) for n, t in again.adapter_state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_the_files_are_those_that_pyreft_writes(method, tmp_path):
    reft = attached(method, layers=[0, 2], tied="group")
    rl.to_pyreft(reft, tmp_path)
    ours, theirs = files(tmp_path), files(FOLDERS / THEIRS[method])
    assert set(ours) == {
        f"intkey_layer_{layer}_comp_block_output_unit_pos_nunit_1#{n}.bin" for layer in (0, 2) for n in (0, 1)
    }
    assert all(kinds(state) == kinds(next(iter(theirs.values()))) for state in ours.values())
    mine = json.loads((tmp_path / "config.json").read_text())
    golden = json.loads((FOLDERS / THEIRS[method] / "config.json").read_text())
    assert mine.keys() - {"reft_lightning"} == golden.keys() - {"transformers_version"}
    assert set(mine["intervention_types"]) == set(golden["intervention_types"])
    assert [row[0] for row in mine["representations"]] == [0, 2, 0, 2]  # all prefixes, then all suffixes
    assert all(len(row) == len(golden["representations"][0]) for row in mine["representations"])
    assert {f"intkey_{key}.bin" for key in mine["sorted_keys"]} == set(ours)


@pytest.mark.parametrize("case", sorted(path.name for path in FOLDERS.iterdir()))
def test_what_pyreft_wrote_goes_back_to_it(case, tmp_path):
    positions = "f2+l3" if "untied" in case else "f2"
    rl.to_pyreft(rl.from_pyreft(base_model(), FOLDERS / case, positions=positions), tmp_path)
    ours, theirs = files(tmp_path), files(FOLDERS / case)
    for name, state in theirs.items():
        mine = ours[name if not case.startswith("older") else name.replace(".", "_").replace("_bin", ".bin")]
        kept = {n: t for n, t in state.items() if (case, n) != ("nodireft_bias_silu", "proj_layer.bias")}
        assert kinds(kept) == kinds(mine)
        for key, tensor in mine.items():
            if key == "rotate_layer":
                assert_close(tensor, state[key], atol=2e-7, rtol=0)
            elif "parametrizations" not in key:
                assert torch.equal(tensor, state[key])
        if PARAMETER in mine:
            both = [orthogonal_map(kept[PARAMETER], kept[BUFFER]) for kept in (mine, state)]
            assert_close(*both, atol=1e-6, rtol=0)


def test_settings_by_layer_activations_heads_and_sites_come_back(tmp_path):
    reft = attached(
        "noreft",
        layers={0: {"rank": 1, "act_fn": "relu"}, 2: {"positions": "f2+l1", "weight_dtype": "bfloat16"}},
        component="model.layers.{layer}.mlp.down_proj.input",
        add_bias=True,
        heads=["model.norm"],
    )
    with torch.no_grad():
        reft.base_model.model.norm.weight.mul_(1.5)
    rl.to_pyreft(reft, tmp_path)
    again = rl.from_pyreft(tiny.model("llama"), tmp_path).eval()
    assert again.config == reft.config
    assert_same(again, reft, exact=True)
    assert "intkey_comp_model_layers[0]_mlp_down_proj_input_unit_pos_nunit_1#0.bin" in files(tmp_path)


def test_what_pyreft_does_not_keep_is_said_in_one_line(tmp_path, caplog):
    rl.to_pyreft(attached("direft", act_fn="relu"), tmp_path)
    (record,) = caplog.records
    assert "positions f1+l2 (as unit_locations of each call)" in record.getMessage()
    assert "act_fn relu" in record.getMessage()
    assert "add_bias=False" in record.getMessage()
    caplog.clear()
    rl.to_pyreft(attached("loreft", weight_dtype="bfloat16"), tmp_path / "2")
    said = caplog.records[0].getMessage()
    assert "with it: positions f1+l2 (as unit_locations of each call); clip='paper'" in said
    caplog.clear()
    rl.to_pyreft(attached("loreft", weight_dtype="bfloat16", clip="floor"), tmp_path / "3")
    assert (
        caplog.records[0].getMessage().endswith("with it: positions f1+l2 (as unit_locations of each call)")
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "red", "rank": None}, "layer 0: pyreft has no intervention 'red'; it has loreft, "),
        ({"tied": "position"}, "layer 0: pyreft has one intervention for all positions.*got tied='position'"),
        ({"tied": "group", "positions": "f1+l1+decode"}, "with 3 interventions"),
        ({"tied": "group", "positions": "l1+f1"}, r"a prefix and a suffix.*got positions='l1\+f1'"),
        ({"method": "none", "heads": ["lm_head"]}, "no interventions"),
    ],
)
def test_what_pyreft_does_not_have_is_refused_before_anything_is_written(settings, said, tmp_path):
    settings = {"method": "loreft", "rank": 2} | settings
    reft = rl.attach(tiny.model("llama"), **{k: v for k, v in settings.items() if v is not None})
    with pytest.raises(ValueError, match=said):
        rl.to_pyreft(reft, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_scale_is_refused(tmp_path):
    reft = attached()
    reft.scale = 0.5
    with pytest.raises(ValueError, match=r"pyreft has no scale, but this adapter has scale=0\.5"):
        rl.to_pyreft(reft, tmp_path)


@pytest.mark.parametrize("write", [rl.to_pyreft, rl.to_easysteer])
def test_one_of_several_adapters_is_not_written_alone(write, tmp_path):
    reft = attached()
    reft.add_adapter("style", "direft", rank=2, positions="f1")
    with pytest.raises(
        ValueError, match=r"has the adapters default, style, but a folder for \w+ holds only one"
    ):
        write(reft, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("write", [rl.to_pyreft, rl.to_easysteer])
@pytest.mark.parametrize("chosen", [{"default": -0.5}, None], ids=str)
def test_a_weight_of_the_active_adapter_is_not_lost_in_silence(tmp_path, write, chosen):
    reft = rl.attach(tiny.model("llama"), rank=2, positions="l2")
    reft.set_adapter(chosen)
    with pytest.raises(ValueError, match="at full weight"):
        write(reft, tmp_path / "out")
    assert not (tmp_path / "out").exists()
