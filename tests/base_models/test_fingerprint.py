"""The fingerprint of a base model's weights."""

import copy

import pytest
import tiny
import torch

from reft_lightning.adapters.adapt import adapt
from reft_lightning.base_models.fingerprint import fingerprint_of


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_weights_have_one_fingerprint_in_every_dtype_and_with_an_adapter(kind):
    model = tiny.model(kind).to(torch.bfloat16).float()  # a checkpoint of 16 bits
    print_ = fingerprint_of(model)
    assert len(print_) == 16
    assert fingerprint_of(copy.deepcopy(model).to(torch.bfloat16)) == print_
    adapt(model, "loreft", rank=2, positions="f1")
    assert fingerprint_of(model) == print_


def test_other_weights_have_another():
    model = tiny.model("llama")
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.layers[1].self_attn.q_proj.weight *= 1.01
    assert fingerprint_of(changed) != fingerprint_of(model)


def test_a_head_and_a_pooler_which_may_be_new_are_no_part_of_it():
    model = tiny.model("bert")
    before = fingerprint_of(model)
    for part in (model.classifier, model.bert.pooler.dense):
        torch.nn.init.normal_(part.weight)
    assert fingerprint_of(model) == before


def test_weights_that_are_elsewhere_have_none():
    assert fingerprint_of(tiny.model("llama").to("meta")) is None
