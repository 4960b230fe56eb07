"""One pass for several adapters gives each the loss and the gradients of a pass of its own."""

import logging

import pytest
import tiny
import torch
from laws import shaken
from training_passes import Rows, encoded

import reft_lightning as rl
from reft_lightning.base_models.random_state import random_state
from reft_lightning.data.encoding import Collator, target_only
from reft_lightning.speed.joined_pass import Asked, JoinedPass, Trained

ADAPTERS = {
    "a": ("loreft", {"rank": 2, "positions": "f2+l2"}),
    "b": ("direft", {"rank": 3, "positions": "l1", "layers": [1]}),
    "c": ("noreft", {"rank": 1, "positions": "prompt", "tied": "all"}),
}
SUFFIXES = {
    "a": ("loreft", {"rank": 2, "positions": "l2"}),
    "b": ("direft", {"rank": 3, "positions": "l1", "layers": [1]}),
    "c": ("red", {"positions": "l1+decode"}),
}


def rows_of(number):
    """Rows of an adapter: other lengths, and another count, than those of the others."""
    return Rows(encoded(8, seed=number, shortest=12 + number))


def attach_all(family, adapters, base=None):
    models = {}
    for number, (name, (method, settings)) in enumerate(adapters.items()):
        torch.manual_seed(number)
        own = base if base is not None else tiny.model(family, torch.float64)
        models[name] = rl.attach(own, method, **settings).train()
        models[name].adapters.double()
        shaken(models[name].interventions)
    return models


def asked_of(number, start=0):
    batch = target_only(Collator(tiny.PAD)(rows_of(number)[start : start + 2 + number]))
    rows, boundary = batch.pop("rows").tolist(), batch.pop("boundary")
    return Asked(batch, rows, boundary, random_state(torch.device("cpu")))


def gradients(model):
    return [parameter.grad for parameter in model.interventions.parameters()]


def joined(family, adapters):
    models = attach_all(family, adapters, tiny.model(family, torch.float64))
    rows = {name: rows_of(number) for number, name in enumerate(adapters)}
    return models, JoinedPass({name: Trained(model, rows[name]) for name, model in models.items()})


@pytest.mark.parametrize(
    ("family", "adapters"),
    [("llama", ADAPTERS), ("llama", SUFFIXES), ("gpt2", SUFFIXES), ("gemma3", ADAPTERS), ("opt", SUFFIXES)],
    ids=["mixed", "suffixes", "gpt2", "gemma3", "opt"],
)
def test_losses_and_gradients_are_those_of_passes_of_their_own(family, adapters):
    alone, (models, one) = attach_all(family, adapters), joined(family, adapters)
    for start in (0, 3):  # gradients of two batches add up
        asked = {name: asked_of(number, start) for number, name in enumerate(adapters)}
        outputs = one.forward(asked)
        assert outputs is not None
        for name in reversed(adapters):  # in any order
            outputs[name].loss.backward()
        one.backward()
        for name, model in alone.items():
            loss = model(**asked[name].inputs).loss
            loss.backward()
            torch.testing.assert_close(outputs[name].loss, loss)
    for name, model in alone.items():
        assert any(gradient.abs().max() > 0 for gradient in gradients(models[name]))
        torch.testing.assert_close(gradients(models[name]), gradients(model))
    assert any(
        one._frozen({name: each}) for name, each in asked.items()
    )  # what is not edited: without gradient
    assert len(one._parts(asked)) == (1 if adapters is SUFFIXES else 2)


def test_batches_of_other_lengths_have_passes_of_their_own():
    _, one = joined("llama", SUFFIXES)
    asked = {name: asked_of(number) for number, name in enumerate(SUFFIXES)}
    one.forward(asked)
    inputs, keys = asked["b"].inputs, ("input_ids", "attention_mask", "prompt_mask")
    longer = {key: torch.cat([inputs[key][:, :1]] * 20 + [inputs[key]], 1) for key in keys}
    asked["b"] = asked["b"]._replace(inputs={**inputs, **longer}, boundary=asked["b"].boundary + 20)
    assert [set(part) for part in one._parts(asked)] == [{"a", "c"}, {"b"}]


def test_an_adapter_that_gives_no_gradient_gets_none_and_the_others_theirs():
    alone, (models, one) = attach_all("llama", ADAPTERS), joined("llama", ADAPTERS)
    asked = {name: asked_of(number) for number, name in enumerate(ADAPTERS)}
    outputs = one.forward(asked)
    for name in ("a", "c"):
        outputs[name].loss.backward()
        alone[name](**asked[name].inputs).loss.backward()
    one.backward()
    for name in ("a", "c"):
        torch.testing.assert_close(gradients(models[name]), gradients(alone[name]))
    assert all(gradient is None or not gradient.any() for gradient in gradients(models["b"]))


def test_an_adapter_that_is_no_longer_finite_changes_no_number_of_the_others():
    alone, (models, one) = attach_all("llama", ADAPTERS), joined("llama", ADAPTERS)
    asked = {name: asked_of(number) for number, name in enumerate(ADAPTERS)}
    one.forward(asked)
    with torch.no_grad():
        for parameter in models["b"].interventions.parameters():
            parameter.fill_(float("inf"))
    outputs = one.forward(asked)
    assert not torch.isfinite(outputs["b"].loss)
    for name in ("a", "c"):
        outputs[name].loss.backward()
        loss = alone[name](**asked[name].inputs).loss
        loss.backward()
        torch.testing.assert_close(outputs[name].loss, loss)
    one.backward()
    for name in ("a", "c"):
        torch.testing.assert_close(gradients(models[name]), gradients(alone[name]))


def test_fewer_adapters_than_there_were_go_on():
    alone, (models, one) = attach_all("llama", ADAPTERS), joined("llama", ADAPTERS)
    one.forward({name: asked_of(number) for number, name in enumerate(ADAPTERS)})
    asked = {"c": asked_of(2, 1)}
    one.forward(asked)["c"].loss.backward()
    one.backward()
    alone["c"](**asked["c"].inputs).loss.backward()
    torch.testing.assert_close(gradients(models["c"]), gradients(alone["c"]))


def test_a_pass_that_differs_is_not_used(caplog):
    _, one = joined("llama", ADAPTERS)
    model = one._adapters["b"].model
    plain = model.forward
    model.forward = lambda **inputs: plain(**{**inputs, "input_ids": inputs["input_ids"].flip(1)})
    asked = {name: asked_of(number) for number, name in enumerate(ADAPTERS)}
    with caplog.at_level(logging.WARNING):
        assert one.forward(asked) is None
        assert one.forward(asked) is None
    assert not one.works
    assert [record.message for record in caplog.records if "changes the logits" in record.message] != []
    assert len(caplog.records) == 1


def test_passes_that_fail_are_left_to_each_adapter(caplog, monkeypatch):
    _, one = joined("llama", ADAPTERS)
    monkeypatch.setattr(one, "_forward", lambda asked: (_ for _ in ()).throw(RuntimeError("out of memory")))
    for _ in range(len(ADAPTERS) + 1):
        assert one.works
        assert one.forward({"a": asked_of(0)}) is None
        one.backward()  # of nothing
    assert not one.works
