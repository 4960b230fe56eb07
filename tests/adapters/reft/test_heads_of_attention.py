"""Interventions on single attention heads, before the map that mixes them."""

import copy

import pytest
import tiny
import torch
from laws import shaken
from model_laws import CLOSE
from torch import nn

import reft_lightning as rl
from reft_lightning.adapters.reft.measuring import watching
from reft_lightning.exchange.folding import folds_of

D = tiny.WIDTH // tiny.HEADS
FOUR = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}


def grouped():
    """Four query heads that share two keys and values, whose width is not that of the stream."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(**{**tiny.SIZES, **FOUR, "head_dim": 6}, initializer_range=0.4, pad_token_id=0)
    return LlamaForCausalLM(config).eval()


def attached(model, method="bias", component="head_output", **settings):
    torch.manual_seed(3)
    reft = rl.attach(
        model, method, **{"positions": "all", "heads": False, "component": component, **settings}
    )
    shaken(reft.interventions)
    return reft.eval()


def mixed(reft, layer, batch):
    """Return what enters the map that mixes the heads of a layer."""
    seen = []
    handle = reft.base_model.get_submodule(reft.sites[str(layer)].path).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach().clone())
    )
    with torch.no_grad():
        reft(**batch)
    handle.remove()
    return seen[0].reshape(*batch["input_ids"].shape, reft.sites[str(layer)].divided, -1)  # (b, s, heads, d)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_edit_of_one_head_leaves_the_others_as_they_are(family):
    model, batch = tiny.model(family), tiny.padded(tiny.rows(5, 3))
    plain = attached(copy.deepcopy(model), component="head_output:1", layers=[1])
    plain.scale = 0.0
    before = mixed(plain, 1, batch)
    edited = attached(model, component="head_output:1", layers=[1])
    after = mixed(edited, 1, batch)
    assert edited.sites["1"].dim == D
    assert torch.equal(after[:, :, 0], before[:, :, 0])
    real = batch["attention_mask"].bool()
    expected = before[real][:, 1] + edited.interventions["1"][0].bias
    torch.testing.assert_close(after[real][:, 1], expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(after[~real], before[~real])


def test_a_head_is_a_head_of_the_queries():
    """Other queries of head 2 change the part that is called head 2, and no other."""
    model, batch = grouped(), tiny.padded(tiny.rows(5, 4))
    reft = attached(model, layers=[0])
    reft.scale = 0.0
    before = mixed(reft, 0, batch)
    query = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        query.weight.view(4, 6, -1)[2].neg_()
    changed = (mixed(reft, 0, batch) != before).any(-1).flatten(0, 1).any(0)
    assert changed.tolist() == [False, False, True, False]
    assert reft.sites["0"].dim == 6
    assert reft.sites["0"].width == 24


@pytest.mark.parametrize("tied", ["all", "group", "position"])
def test_every_head_has_its_own_intervention(tied):
    model = grouped()
    reft = attached(model, "direft", rank=2, positions="f1+l2", tied=tied, component="head_output:0+3")
    copies = {"all": 1, "group": 2, "position": 3}[tied]
    assert [len(group) for group in reft.interventions.values()] == [2 * copies] * 3
    batch = tiny.padded(tiny.rows(5))
    edited = mixed(reft, 0, batch)[0]
    reft.scale = 0.0
    plain = mixed(reft, 0, batch)[0]  # (s, heads, d)
    slots = {"all": [0, 0, 0], "group": [0, 1, 1], "position": [0, 2, 1]}[tied]
    for column, slot in zip((0, 3, 4), slots, strict=True):
        for k, head in enumerate((0, 3)):
            phi = reft.interventions["0"][2 * slot + k]
            expected = phi(plain[column, head][None])[0]
            torch.testing.assert_close(edited[column, head], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(edited[:, 1:3], plain[:, 1:3])
    assert torch.equal(edited[1:3], plain[1:3])


def test_heads_and_the_whole_are_edited_one_after_the_other():
    model, batch = grouped(), tiny.padded(tiny.rows(4, 3))
    reft = attached(model, component="head_output:1", layers=[0])
    reft.add_adapter("everything", "red", component="model.layers.{layer}.self_attn.o_proj.input", layers=[0],
                     positions="all")  # fmt: skip
    shaken(reft.adapters["everything"], seed=7)
    plain = attached(copy.deepcopy(model), layers=[0])
    plain.scale = 0.0
    before = mixed(plain, 0, batch)
    bias, red = reft.interventions["0"][0].bias, reft.adapters["everything"].interventions["0"][0]
    first = before.clone()
    first[:, :, 1] += bias
    real = batch["attention_mask"].bool()
    reft.set_adapter(["default", "everything"])
    stacked = red(first.flatten(2)[real])
    torch.testing.assert_close(mixed(reft, 0, batch).flatten(2)[real], stacked, atol=1e-5, rtol=1e-5)
    reft.set_adapter({"default": 2.0, "everything": 1.0})
    summed = red(before.flatten(2)[real]) + 2 * (first - before).flatten(2)[real]
    torch.testing.assert_close(mixed(reft, 0, batch).flatten(2)[real], summed, atol=1e-5, rtol=1e-5)


def test_generation_padding_files_and_rows_of_other_adapters(tmp_path):
    layers = {1: {"component": "head_output:2"}, 2: {}}
    reft = attached(grouped(), "loreft", rank=2, positions="prompt+decode:2", layers=layers)
    left, settings = tiny.padded(tiny.rows(5, 3), "left"), {"max_new_tokens": 5, "do_sample": False}
    cached = reft.generate(**left, **settings)
    assert torch.equal(cached, reft.generate(**left, **settings, use_cache=False))
    alone = [reft(text[None]).logits[0, -1] for text in tiny.rows(5, 3)]
    torch.testing.assert_close(list(reft(**left).logits[:, -1]), alone, **CLOSE)
    names = ["default", None]
    mixed_rows = reft(**left, adapter_names=names).logits
    torch.testing.assert_close(mixed_rows[0], reft(**left).logits[0], **CLOSE)
    with reft.disabled():
        torch.testing.assert_close(mixed_rows[1], reft(**left).logits[1], **CLOSE)
    reft.save_pretrained(tmp_path)
    loaded = rl.ReftModel.from_pretrained(grouped(), tmp_path).eval()
    assert torch.equal(loaded.generate(**left, **settings), cached)
    assert [len(group) for group in loaded.interventions.values()] == [1, 4]


def test_gradients_reach_every_head_with_and_without_checkpointing():
    reft = attached(grouped(), "red").train()
    batch = tiny.prompt_target(tiny.rows(5, 3), tiny.rows(2, 2, seed=1))
    reft(**batch).loss.backward()
    expected = [p.grad.clone() for p in reft.interventions.parameters()]
    assert all(grad.abs().max() > 0 for grad in expected)
    reft.zero_grad()
    reft.base_model.gradient_checkpointing_enable()
    reft(**batch).loss.backward()
    torch.testing.assert_close(
        [p.grad for p in reft.interventions.parameters()], expected, atol=1e-6, rtol=1e-5
    )


def test_what_heads_do_can_be_watched():
    reft, seen = attached(grouped(), layers=[1], positions="l2"), []
    with watching(reft, lambda found: seen.append(found.places.tolist())):
        reft(**tiny.padded(tiny.rows(5, 3)))
    assert seen == [[0, 1, 0, 1]] * 4  # l2 and l1 of two rows, for each head


def test_heads_that_are_not_there_are_refused():
    model = grouped()
    for heads in ("4", "0+0", "x", "-1", "", "0,1"):
        with pytest.raises(ValueError, match=r"must name distinct heads in 0\.\.3, as in head_output:0\+3"):
            attached(model, component=f"head_output:{heads}")


def test_a_model_whose_heads_are_not_known_is_refused():
    model = grouped()
    model.config.num_attention_heads = 5
    with pytest.raises(ValueError, match="not a multiple of the 5 heads"):
        attached(model)
    for block in model.model.layers:
        block.self_attn = nn.Sequential(block.self_attn)
    with pytest.raises(ValueError, match="head_output was not found"):
        attached(model)


def test_heads_do_not_become_weights():
    with pytest.raises(ValueError, match="each of its heads has its own intervention"):
        folds_of(attached(grouped()))


def test_marked_tokens_are_edited():
    model = tiny.model("llama")
    reft = attached(model, component="block_output", positions="given", layers=[0])
    left = tiny.padded(tiny.rows(5, 3), "left")
    marks = torch.tensor([[1, 0, 0, 1, 0], [1, 1, 1, 0, 0]]).bool()

    def chosen(prompt, target):
        return prompt & torch.nn.functional.pad(marks, (0, prompt.shape[1] - 5))

    positions = attached(copy.deepcopy(model), component="block_output", layers=[0], positions=chosen)
    settings = {"max_new_tokens": 4, "do_sample": False}
    expected = positions.generate(**left, **settings)
    assert torch.equal(reft.generate(**left, **settings, edit_mask=marks), expected)
    assert torch.equal(reft.generate(**left, **settings, edit_mask=marks, use_cache=False), expected)
    assert torch.equal(reft(**left, edit_mask=marks).logits, positions(**left).logits)
    right = tiny.padded(tiny.rows(5, 3))
    moved = torch.tensor([[1, 0, 0, 1, 0], [1, 0, 0, 0, 0]]).bool()  # the mask moves with its row
    assert torch.equal(reft.generate(**right, **settings, edit_mask=moved), expected)
    for bad, message in ((None, "need edit_mask"), (marks[:, :3], r"edit_mask must have the shape \(2, 5\)")):
        with pytest.raises(ValueError, match=message):
            reft(**left, edit_mask=bad)
