"""attach(): the arguments it accepts, how interventions are tied, and what forward() refuses."""

import copy

import numpy as np
import pytest
import tiny
import torch
from laws import shaken
from model_laws import CLOSE
from transformers import PreTrainedModel

import reft_lightning as rl
from reft_lightning.adapters.reft.measuring import saved_interventions
from reft_lightning.integrations.transformers import as_pretrained


def attach(method="loreft", **settings):
    torch.manual_seed(1)
    reft = rl.attach(tiny.model("llama"), method, **{"rank": 2, "positions": "f1+l1", **settings})
    shaken(reft.interventions)
    return reft.eval()


BATCH = tiny.padded(tiny.rows(6, 4), "left")


def test_defaults_are_the_contract_s():
    reft = rl.attach(tiny.model("llama"), rank=2)
    config = reft.config
    assert (config.method, config.layers) == ("loreft", [0, 1, 2])
    assert (config.positions, config.tied, config.component) == ("f7+l7", "all", "block_output")
    assert [len(group) for group in reft.interventions.values()] == [1, 1, 1]


@pytest.mark.parametrize(
    ("tied", "positions", "copies"),
    [("all", "f2+l1", 1), ("group", "f2+l1", 2), ("group", "l3", 1), ("position", "f2+l1", 3),
     ("position", "l2+decode:2", 4)],
)  # fmt: skip
def test_tying_decides_the_number_of_interventions(tied, positions, copies):
    reft = attach(tied=tied, positions=positions)
    assert {len(group) for group in reft.interventions.values()} == {copies}
    expected = 3 * copies * (2 * 2 * tiny.WIDTH + 2)
    assert reft.parameter_count().trainable == expected
    reft(**BATCH).logits.square().sum().backward()
    unused = {"l2+decode:2": ("2", "3")}.get(positions, ())  # no token follows these prompts
    for name, parameter in reft.interventions.named_parameters():
        assert (parameter.grad is None or not parameter.grad.any()) == (name.split(".")[1] in unused), name


def test_equal_copies_give_the_same_result_however_they_are_tied():
    tied = attach(positions="f2+l1")
    expected = tied(**BATCH).logits
    for how in ("group", "position"):
        other = attach(positions="f2+l1", tied=how)
        for key, group in other.interventions.items():
            for phi in group:
                phi.load_state_dict(tied.interventions[key][0].state_dict())
        torch.testing.assert_close(other(**BATCH).logits, expected, **CLOSE)


def test_each_position_has_its_own_intervention():
    reft = attach(positions="f2+l1", tied="position", layers=[1])
    before = reft(**BATCH, output_hidden_states=True).hidden_states[2]
    for copy_, columns in enumerate([{0, 2}, {1, 3}, {5}]):  # f: first, second; l: last, of both rows
        other = copy.deepcopy(reft)
        shaken(other.interventions["1"][copy_], seed=9)
        after = other(**BATCH, output_hidden_states=True).hidden_states[2]
        changed = (before - after).abs().amax(-1) > 1e-4
        assert set(changed.nonzero()[:, 1].tolist()) == columns


def test_a_prompt_shorter_than_asked_is_clipped_not_refused():
    reft = attach(positions="f7+l7", tied="position")
    for n in (1, 2, 3, 5, 14, 20):
        assert reft(**tiny.padded(tiny.rows(n))).logits.isfinite().all()
    empty = tiny.padded([*tiny.rows(3), torch.empty(0, dtype=torch.long)])
    assert reft(**empty).logits[0].isfinite().all()


def test_layers_may_have_their_own_settings():
    reft = attach(
        layers={0: {}, 2: {"rank": 4, "positions": "all", "method": "direft", "component": "mlp_output"}}
    )
    assert list(reft.interventions) == ["0", "2"]
    first, last = reft.interventions["0"][0], reft.interventions["2"][0]
    assert (type(first), first.rank) == (rl.LoReFT, 2)
    assert (type(last), last.rank) == (rl.DiReFT, 4)
    assert reft.sites["2"].path == "model.layers.2.mlp"
    assert reft(**BATCH).logits.isfinite().all()
    with reft.disabled():
        base = reft(**BATCH).logits
    assert not torch.allclose(reft(**BATCH).logits[1, 3], base[1, 3])  # l1+f1 skip it, all does not


def test_the_input_of_a_block_is_the_output_of_the_block_before():
    after, before = attach(layers=[0]), attach(layers=[1], component="block_input")
    before.interventions["1"].load_state_dict(after.interventions["0"].state_dict())
    assert torch.equal(before(**BATCH).logits, after(**BATCH).logits)


@pytest.mark.parametrize(
    ("path", "same_as"),
    [
        ("model.layers.{layer}", "block_output"),
        ("model.layers.{layer}.output", "block_output"),
        ("model.layers.{layer}.input", "block_input"),
        ("model.layers.{layer}.mlp", "mlp_output"),
        ("model.layers.{layer}.mlp.down_proj", "mlp_output"),
        ("model.layers.{layer}.self_attn.o_proj", "attention_output"),
    ],
)
def test_a_module_path_is_a_component(path, same_as):
    by_path, by_name = attach(component=path), attach(component=same_as)
    assert torch.equal(by_path(**BATCH).logits, by_name(**BATCH).logits)


@pytest.mark.parametrize(
    ("method", "default"), [("loreft", torch.bfloat16), ("direft", torch.float16), ("cast", torch.bfloat16)]
)
def test_a_default_of_16_bits_is_that_of_the_base_model_alone(method, default, tmp_path):
    torch.set_default_dtype(default)
    try:
        base = tiny.model("llama", default)
        reft = rl.attach(base, method, positions="prompt", **({} if method == "cast" else {"rank": 2}))
        assert {p.dtype for p in reft.interventions.parameters()} == {torch.float32}
        assert torch.get_default_dtype() == default
        assert reft(torch.tensor([[5, 6, 7]])).logits.dtype == default
        reft.save_pretrained(tmp_path)
        for saved, own in zip(saved_interventions(tmp_path)[0], reft.interventions["0"], strict=True):
            assert all(map(torch.equal, saved.parameters(), own.parameters()))
    finally:
        torch.set_default_dtype(torch.float32)


def test_forward_refuses_what_it_cannot_place():
    reft = attach()
    ids, cache = BATCH["input_ids"], reft(**BATCH, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="needs input_ids or inputs_embeds"):
        reft(attention_mask=BATCH["attention_mask"])
    with pytest.raises(ValueError, match="with past_key_values, pass prompt_mask"):
        reft(ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="labels for only the last columns need a prompt_mask"):
        reft(**BATCH, labels=ids[:, -2:])
    with pytest.raises(ValueError, match="prompt_mask must have the shape"):
        reft(**BATCH, prompt_mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="prompt_mask must have the shape"):
        reft.generate(**BATCH, prompt_mask=torch.ones(2, 1, dtype=torch.bool))


@pytest.mark.parametrize(
    ("positions", "wrap"),
    [("f1+l1", lambda reft: reft), ("decode:2", as_pretrained), ("all", lambda reft: reft)],
)
def test_labels_with_gaps_are_warned_of_once_where_they_change_what_a_prompt_is(positions, wrap, caplog):
    ids = torch.stack(tiny.rows(9, 9))
    conversation, answer = torch.full_like(ids, -100), torch.full_like(ids, -100)
    conversation[1, 2:4] = ids[1, 2:4]  # question, answer, question, answer
    conversation[1, 6:8] = ids[1, 6:8]
    conversation[0, 5:8] = answer[:, 5:8] = ids[0, 5:8]
    for labels, warnings in ((answer, 0), *[(conversation, positions != "all")] * 2):
        wrap(reft := attach(positions=positions).train())(input_ids=ids, labels=labels)
        wrap(reft)(input_ids=ids, labels=labels)
        assert len(caplog.records) == warnings
        assert warnings == 0 or f"for the positions {positions} its prompt ends" in caplog.text
        caplog.clear()
    told = torch.arange(9).expand(2, 9) < 6  # by the caller
    wrap(reft)(input_ids=ids, labels=conversation, prompt_mask=told)
    assert not caplog.records


@pytest.mark.parametrize("name", ["edit_mask", "prompt_mask"])
def test_a_mask_of_strengths_is_refused(name):  # each but 0 counted as 1
    reft = attach(positions="given" if name == "edit_mask" else "f1+l1")
    marked = BATCH["attention_mask"].bool()
    for whole in (marked, marked.long(), marked.float()):
        assert torch.equal(reft(**BATCH, **{name: whole}).logits, reft(**BATCH, **{name: marked}).logits)
    for run in (reft, reft.generate):
        with pytest.raises(ValueError, match=f"{name} must hold only 0 and 1"):
            run(**BATCH, **{name: 0.5 * marked.float()})


def test_embeddings_may_be_given_for_tokens():
    reft = attach()
    embeds = reft.base_model.get_input_embeddings()(BATCH["input_ids"])
    got = reft(inputs_embeds=embeds, attention_mask=BATCH["attention_mask"])
    assert torch.equal(got.logits, reft(**BATCH).logits)


def test_words_of_other_libraries_are_answered_with_ours():
    reft = attach()
    for name, said in (
        ("merge_and_unload", "here it is reft_lightning.merge(reft), if the weights can hold the edits"),
        ("get_base_model", "here it is base_model"),
        (
            "gradient_checkpointing_enable",
            "its base_model has it: reft.base_model.gradient_checkpointing_enable. For",
        ),
        (
            "generation_config",
            "its base_model has it: reft.base_model.generation_config. For code that expects a",
        ),
        ("can_generate", "use integrations.transformers.as_pretrained(reft)"),
        ("scales", "'ReftModel' object has no attribute 'scales'"),  # Python itself names the nearest
    ):
        assert not hasattr(reft, name)
        with pytest.raises(AttributeError) as found:
            getattr(reft, name)
        assert said in str(found.value)
        assert (found.value.name, found.value.obj) == (name, reft)
    with pytest.raises(AttributeError, match="_modules"):  # before it is built
        rl.ReftModel.__new__(rl.ReftModel)._modules  # noqa: B018


def test_a_scale_that_is_no_finite_number_is_refused_when_it_is_set():  # NaN was saved, and could not be loaded
    reft = attach()
    reft.add_adapter("style", "direft", rank=2)
    for value in (float("nan"), float("inf"), None, "0.5", True, torch.ones(2)):
        for scaled in (reft, reft.adapters["style"]):
            with pytest.raises(ValueError, match="scale must be a finite number; got"):
                scaled.scale = value
    assert reft.scale == reft.adapters["style"].scale == 1


def test_a_scale_of_torch_or_numpy_is_a_number():
    reft = attach()
    for value in (torch.tensor(-0.5), np.float32(-0.5)):
        reft.scale = value
        assert (reft.scale, type(reft.saved_config().scale)) == (-0.5, float)


def test_without_an_attention_mask_every_token_is_real():
    reft, ids = attach(), torch.stack(tiny.rows(5, 5))
    assert torch.equal(reft(ids).logits, reft(ids, torch.ones_like(ids)).logits)


@pytest.mark.parametrize("positions", ["f1+l2", "all", "l1+decode:1"])
def test_a_text_read_in_two_parts_with_a_cache_is_edited_as_a_whole(positions):
    reft = attach(positions=positions)
    texts, targets = tiny.rows(6, 4), tiny.rows(3, 2, seed=1)
    batch = tiny.prompt_target(texts, targets)
    del batch["labels"]
    expected = reft(**batch).logits
    for cut in (6, 7):  # the first part holds the whole prompt
        mask, prompt = batch["attention_mask"], batch["prompt_mask"]
        ids = batch["input_ids"]
        first = reft(ids[:, :cut], mask[:, :cut], prompt_mask=prompt[:, :cut], use_cache=True)
        rest = reft(ids[:, cut:], mask, prompt_mask=prompt, past_key_values=first.past_key_values)
        torch.testing.assert_close(rest.logits[:, :2], expected[:, cut : cut + 2], **CLOSE)


@pytest.mark.skipif(
    not hasattr(PreTrainedModel, "activation_checkpointing_enable"),
    reason="an older transformers runs the hooks of a block inside its checkpoint, too",
)
def test_reentrant_checkpointing_is_refused_where_it_would_lose_gradients():
    batch = tiny.padded(tiny.rows(5, 4))
    outside = attach()
    outside(**batch).logits.sum().backward()
    expected = outside.interventions["0"][0].source.bias.grad.clone()
    outside.zero_grad()
    for reft in (outside, attach(component="mlp_output")):
        reft.train()
        reft.base_model.gradient_checkpointing_enable({"use_reentrant": True})
    outside(**batch).logits.sum().backward()
    torch.testing.assert_close(outside.interventions["0"][0].source.bias.grad, expected, **CLOSE)
    with pytest.raises(ValueError, match=r"no gradient reaches model\.layers\.0\.mlp: .*use_reentrant=False"):
        reft(**batch)


def test_the_count_is_printed_in_peft_s_words(capsys):
    reft = attach()
    count = reft.parameter_count()
    reft.print_trainable_parameters()
    line = capsys.readouterr().out
    assert line.startswith(f"trainable params: {3 * (2 * 2 * 16 + 2):,} || base params: {count.base:,} ||")
    assert count.base == sum(p.numel() for p in tiny.model("llama").parameters())
    assert count.percent == 100 * count.trainable / count.base
