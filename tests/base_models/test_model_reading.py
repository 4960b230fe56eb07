"""Trying a model tells whether it is causal and whether padding needs position ids."""

import copy
import logging

import architectures
import pytest
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from reft_lightning.base_models.bare import bare_copy
from reft_lightning.base_models.reading import Reading, keeps_its_columns, position_ids_for, reading_of

BOTH_WAYS = {"use_bidirectional_attention": True}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 20}


def built(name, auto=AutoModelForCausalLM, **own):
    return architectures.build(auto, CONFIG_MAPPING[name], **own)


@pytest.mark.parametrize(
    ("name", "own", "causal"),
    [
        ("llama", {}, True),
        ("gpt2", {}, True),
        ("mixtral", {"output_router_logits": True}, True),
        ("mamba", {}, True),
        ("qwen3_next", {}, True),
        ("gemma3_text", {}, True),
        ("gemma3_text", BOTH_WAYS, False),
        ("bert", {}, False),
        ("bert", {"is_decoder": True}, True),
        ("xlnet", {}, False),
    ],
)
def test_a_change_of_the_last_token_tells_who_reads_backwards(name, own, causal):
    for dtype in (torch.float32, torch.bfloat16):
        assert reading_of(built(name, **own).to(dtype)).causal is causal, dtype


def test_a_masked_language_model_and_a_classifier_are_not_causal():
    assert not reading_of(built("roberta", AutoModelForMaskedLM)).causal
    assert not reading_of(built("llama", AutoModelForSequenceClassification)).causal


def test_columns_of_dynamic_rope_depend_on_what_follows_though_it_is_causal():
    model = built("llama", rope_parameters=DYNAMIC)
    assert reading_of(model).causal
    assert not keeps_its_columns(model)
    assert keeps_its_columns(built("llama"))


@pytest.mark.parametrize(
    ("name", "needed"),
    [("llama", True), ("gpt2", True), ("opt", False), ("roberta", False), ("bloom", False)],
)
def test_position_ids_are_needed_where_a_model_has_no_rule_of_its_own(name, needed):
    model = built(name)
    right = torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert reading_of(model).needs_position_ids is needed
    assert position_ids_for(model, None, 3, {}) is None
    assert position_ids_for(model, right, 3, {}) is None
    assert position_ids_for(model, right.flip(1), 3, {"pixel_values": torch.ones(1, 3, 2, 2)}) is None
    given = position_ids_for(model, right.flip(1), 2, {"use_cache": True, "logits_to_keep": torch.ones(1)})
    assert (given.tolist() if given is not None else None) == ([[1, 2], [0, 0]] if needed else None)
    holes = position_ids_for(model, torch.tensor([[1, 0, 1]]), 3, {})
    assert (holes.tolist() if holes is not None else None) == ([[0, 0, 1]] if needed else None)


def test_a_model_is_tried_once_and_its_copy_again():
    model = built("llama")
    assert reading_of(model) == Reading(True, True)
    model.register_forward_pre_hook(lambda *call: pytest.fail("tried again"))
    assert reading_of(model) == Reading(True, True)
    copied = copy.deepcopy(model)
    assert reading_of(copied) == Reading(True, True)


def test_a_model_that_cannot_be_copied_is_tried_itself_and_left_as_it_was(caplog):
    model = built("llama").train()
    model.extra = torch.nn.Linear(2, 2)  # no configuration knows of it
    with pytest.raises(RuntimeError, match="extra"):
        bare_copy(model)
    with caplog.at_level(logging.DEBUG):
        assert reading_of(model) == Reading(True, True)
    assert "so it is tested itself" in caplog.text
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt"])
def test_a_bare_copy_shares_the_weights_and_nothing_else(family):
    model, ids = tiny.model(family), tiny.rows(6)[0][None]
    expected = model(input_ids=ids).logits
    model.register_forward_hook(lambda *call: pytest.fail("a hook came along"))
    bare = bare_copy(model.train())
    assert torch.equal(bare(input_ids=ids).logits, expected)
    assert model.training
    shared = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert {name: tensor.data_ptr() for name, tensor in bare.state_dict().items()} == shared


@pytest.mark.parametrize("first", [0, architectures.LAYERS - 1], ids=["all layers", "the last layer"])
def test_a_decoder_that_was_told_to_read_both_ways_is_found_out(first):
    model = built("llama")
    for layer in model.model.layers[first:]:
        layer.self_attn.is_causal = False
    model.config._attn_implementation = "sdpa"
    assert not reading_of(model).causal


class Rounds(LlamaForCausalLM):
    """Changes earlier columns a little with the last one, as rounding can."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + 0.01 * out.logits[:, -1:]
        return out


def test_a_decoder_that_rounds_by_what_follows_is_still_causal():
    assert reading_of(Rounds(built("llama").config)).causal


def test_a_vocabulary_of_a_few_tokens_is_enough():
    assert reading_of(built("llama", vocab_size=6, pad_token_id=0)).causal
    assert reading_of(built("gpt2", vocab_size=6, pad_token_id=0, bos_token_id=1, eos_token_id=1)).causal


def test_a_model_that_cannot_be_tried_is_taken_for_what_it_is_called(caplog, monkeypatch):
    model = built("gpt2")

    def fails(*args, position_ids=None, **kwargs):
        raise RuntimeError("no text")

    model.forward = fails
    monkeypatch.setattr(type(model.config), "to_dict", fails)
    assert reading_of(model) == Reading(True, True)
    assert "could not be tested" in caplog.text


def test_a_number_that_goes_with_a_text_changes_no_position():
    model, mask = built("gpt2"), torch.tensor([[0, 1, 1], [1, 1, 1]])
    expected = position_ids_for(model, mask, 3, {})
    assert expected is not None
    numbers = {"num_items_in_batch": torch.tensor(4), "shift_labels": mask, "start_positions": mask[:, 0]}
    for name, value in numbers.items():
        assert torch.equal(position_ids_for(model, mask, 3, {name: value}), expected)
    assert position_ids_for(model, mask, 3, {"pixel_values": torch.ones(1, 3, 2, 2)}) is None
