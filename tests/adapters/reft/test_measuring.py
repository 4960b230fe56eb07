"""Edits are measured by layer and position while the model runs, and can be left out."""

import pytest
import tiny
import torch
from laws import shaken

import reft_lightning as rl
from reft_lightning.adapters.reft.measuring import (
    EditNorms,
    interventions_by_layer,
    leaving_out,
    places_of,
    saved_interventions,
    subspace,
    watching,
)
from reft_lightning.adapters.reft.positions import parse_positions

BATCH = tiny.prompt_target(tiny.rows(7, 5, 3), tiny.rows(3, 2, 4, seed=1))


def attached(method="loreft", family="llama", **settings):
    torch.manual_seed(0)
    defaults = {"positions": "f2+l2", "layers": [0, 2], "rank": 3}
    reft = rl.attach(tiny.model(family), method, **(defaults | settings)).eval()
    for phi in (phi for group in reft.interventions.values() for phi in group):
        shaken(phi)
    return reft


@torch.no_grad()
def logits(reft):
    return reft(**BATCH).logits


def norms_of(reft):
    norms = EditNorms(reft)
    with watching(reft, norms):
        logits(reft)
    return norms


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("f2+l3", ["f1", "f2", "l3", "l2", "l1"]),
        ("l2+decode:2", ["l2", "l1", "decode:1", "decode:2"]),
        ("prompt+decode", ["prompt", "decode"]),
        ("all", ["all"]),
        ("f11", [f"f{i}" for i in range(1, 12)]),
    ],
)
def test_places_are_named_from_left_to_right(positions, expected):
    assert places_of(attached(positions=positions)) == expected


def test_a_callable_is_one_place():
    assert places_of(attached(positions=lambda prompt, target: prompt)) == ["selected"]


@pytest.mark.parametrize("tied", ["all", "group", "position"])
def test_norms_are_those_of_the_hidden_states_before_and_after_and_zero_where_nothing_is_selected(tied):
    base, seen = tiny.model("llama"), {}

    def keep(when):
        return lambda module, args, output: seen.setdefault(when, output.detach())

    block = base.model.layers[2]
    block.register_forward_hook(keep("before"))
    torch.manual_seed(0)
    reft = rl.attach(base, "loreft", rank=3, positions="f2+l2", layers=[0, 2], tied=tied).eval()
    block.register_forward_hook(keep("after"))
    norms = norms_of(reft)
    edit = seen["after"] - seen["before"]  # (b, s, d)
    ratio = edit.norm(dim=-1) / seen["before"].norm(dim=-1).clamp(min=1e-12)  # padding is embedded as 0
    prompt = BATCH["prompt_mask"]
    slots = parse_positions("f2+l2").select(prompt, BATCH["attention_mask"].bool() & ~prompt)
    selected = torch.stack(slots).amax(0) >= 0
    assert ratio[~selected].abs().max() == 0
    found = dict(zip(norms.places, norms.by_place()[2], strict=True))
    for name, grid, slot in (("f1", 0, 0), ("f2", 0, 1), ("l1", 1, 0), ("l2", 1, 1)):
        torch.testing.assert_close(found[name], ratio[slots[grid] == slot].mean())
    torch.testing.assert_close(norms.by_layer()[2], ratio[selected].mean())
    torch.testing.assert_close(norms.mean_edits()[2], edit[selected].mean(0))


def test_a_pass_that_goes_on_from_a_cache_is_seen_at_its_own_columns():
    reft = attached(positions="decode:2")
    norms = EditNorms(reft)
    with torch.no_grad(), watching(reft, norms):
        reft.generate(tiny.rows(4)[0].unsqueeze(0), max_new_tokens=4, do_sample=False)
    assert {layer: count.tolist() for layer, count in norms.counts.items()} == {0: [1, 1], 2: [1, 1]}


def test_nothing_stays_after_watching():
    reft = attached()
    before = logits(reft)
    with watching(reft, lambda seen: seen.before):
        assert not torch.equal(logits(reft), before)
    assert torch.equal(logits(reft), before)
    assert not any(phi._forward_hooks for group in reft.interventions.values() for phi in group)


@pytest.mark.parametrize("method", ["loreft", "direft", "consreft"])
def test_without_all_layers_or_all_positions_the_model_is_the_base(method):
    reft = attached(method)
    with reft.disabled():
        base = logits(reft)
    assert not torch.equal(logits(reft), base)
    with leaving_out(reft, layers=[int(key) for key in reft.interventions]):
        assert torch.equal(logits(reft), base)
    with leaving_out(reft, places=places_of(reft)):
        assert torch.equal(logits(reft), base)


def test_without_one_layer_the_rest_is_an_adapter_of_the_rest():
    both, one = attached(), attached(layers=[2])
    one.interventions["2"].load_state_dict(both.interventions["2"].state_dict())
    with leaving_out(both, layers=[0]):
        assert torch.equal(logits(both), logits(one))


def test_without_some_positions_the_others_are_edited_as_before():
    both, one = attached(), attached(positions="l2")
    one.interventions.load_state_dict(both.interventions.state_dict())
    with leaving_out(both, places=["f1", "f2"]):
        torch.testing.assert_close(logits(both)[0], logits(one)[0])  # a short prompt clips f2+l2 otherwise


def test_what_is_not_edited_cannot_be_left_out():
    for given in ({"layers": [1]}, {"places": ["f3"]}):
        with pytest.raises(ValueError, match="is not edited; these are"), leaving_out(attached(), **given):
            pass


def test_a_saved_adapter_has_its_subspaces_without_a_base_model(tmp_path):
    for method in ("loreft", "direft"):
        reft = attached(method, tied="group")
        reft.save_pretrained(tmp_path / method)
        saved = saved_interventions(tmp_path / method)
        assert saved.keys() == {0, 2}
        for layer, group in interventions_by_layer(reft).items():
            assert torch.equal(subspace(saved[layer]), subspace(group))
            assert subspace(group).shape == (6, tiny.WIDTH)  # two interventions of rank 3


def test_the_subspace_holds_every_edit_and_nothing_else():
    reft = attached("direft")
    phi = reft.interventions["0"][0]
    h = torch.randn(20, tiny.WIDTH)
    edit, rows = (phi(h) - h).double(), subspace([phi])
    torch.testing.assert_close(rows @ rows.mT, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(edit @ rows.mT @ rows, edit, atol=1e-6, rtol=1e-5)
    assert len(subspace([phi, phi])) == 3  # the second adds no direction


def test_edits_that_may_point_anywhere_have_no_subspace():
    reft = rl.attach(tiny.model("llama"), "red")
    assert subspace(list(reft.interventions["0"])) is None


def test_edits_of_different_heads_have_no_mean():
    layers = {0: {"component": "head_output"}, 2: {}}
    assert norms_of(attached(layers=layers)).mean_edits().keys() == {2}
