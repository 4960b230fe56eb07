"""Optimizer groups by role, and the learning rate by step."""

import logging
import math

import pytest
import tiny
import torch

from reft_lightning import attach
from reft_lightning.training.optimization import Optimization, parameter_groups, schedule_factor


def groups(method="loreft", **settings):
    reft = attach(tiny.model("llama"), method, rank=4)
    return reft, {g["name"]: g for g in parameter_groups(reft.parameter_roles(), Optimization(**settings))}


def test_decay_acts_on_weights_and_never_on_rotations_or_biases():
    _, found = groups(weight_decay=0.3)
    assert {name: group["weight_decay"] for name, group in found.items()} == {
        "rotation": 0.0,
        "weight": 0.3,
        "bias": 0.0,
    }


@pytest.mark.parametrize(
    "method", ["loreft", "direft", "noreft", "consreft", "lobireft", "direft_orthonormal"]
)
def test_every_trained_parameter_is_in_one_group(method):
    reft, found = groups(method)
    grouped = [p for group in found.values() for p in group["params"]]
    trained = [p for p in reft.parameters() if p.requires_grad]
    assert len(grouped) == len(trained)
    assert {id(p) for p in grouped} == {id(p) for p in trained}


def test_a_head_has_its_own_rate_and_decays():
    reft = attach(tiny.model("bert"), "loreft", rank=4, heads=["classifier"])
    settings = Optimization(lr=1e-3, head_lr=1e-5, weight_decay=0.1)
    found = {g["name"]: g for g in parameter_groups(reft.parameter_roles(), settings)}
    assert (found["head"]["lr"], found["head"]["weight_decay"]) == (1e-5, 0.1)
    assert found["weight"]["lr"] == 1e-3
    assert (found["head_bias"]["lr"], found["head_bias"]["weight_decay"]) == (1e-5, 0)
    classifier = reft.base_model.classifier
    assert [id(p) for p in found["head"]["params"]] == [id(classifier.weight)]
    assert [id(p) for p in found["head_bias"]["params"]] == [id(classifier.bias)]


def test_the_groups_are_logged(caplog):
    with caplog.at_level(logging.INFO, "reft_lightning.training.optimization"):
        groups(weight_decay=0.3, lr=0.01)
    assert "optimizer group weight: 192 parameters, lr 0.01, weight decay 0.3" in caplog.text
    assert "optimizer group rotation: 192 parameters, lr 0.01, weight decay 0" in caplog.text


def test_rotations_stay_orthonormal_under_decay():
    reft, found = groups(weight_decay=0.5, lr=0.1)
    optimizer = torch.optim.AdamW(found.values())
    batch = tiny.prompt_target(tiny.rows(6, 3), tiny.rows(2, 4))
    before = {name: p.clone() for name, p in reft.base_model.named_parameters()}
    for _ in range(10):
        reft(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for group in reft.interventions.values():
        for phi in group:
            torch.testing.assert_close(phi.R @ phi.R.mT, torch.eye(4), atol=1e-5, rtol=0)
    for name, parameter in reft.base_model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_the_rate_rises_linearly_and_then_falls_to_zero():
    factor = schedule_factor(Optimization(schedule="linear", warmup_ratio=0.1), 100)
    assert [factor(s) for s in (0, 5, 10, 55, 100)] == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_the_linear_schedule_is_that_of_transformers():
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = get_linear_schedule_with_warmup(optimizer, 3, 23).lr_lambdas[0]
    factor = schedule_factor(Optimization(schedule="linear", warmup_ratio=3 / 23), 23)
    assert [factor(s) for s in range(24)] == pytest.approx([reference(s) for s in range(24)])


def test_the_cosine_schedule_passes_half_at_its_middle():
    factor = schedule_factor(Optimization(schedule="cosine", warmup_ratio=0), 10)
    assert [factor(s) for s in (0, 5, 10)] == pytest.approx([1, 0.5, 0])
    assert factor(1) == pytest.approx(0.5 * (1 + math.cos(math.pi / 10)))


def test_the_constant_schedule_stays_after_its_warm_up():
    factor = schedule_factor(Optimization(schedule="constant", warmup_ratio=0.2), 10)
    assert [factor(s) for s in (0, 1, 2, 9, 50)] == [0, 0.5, 1, 1, 1]


def test_a_run_without_an_end_takes_the_constant_schedule_alone():
    assert schedule_factor(Optimization(schedule="constant", warmup_ratio=0), math.inf)(1000) == 1
    with pytest.raises(ValueError, match=r"needs the number of steps: set trainer\.max_steps"):
        schedule_factor(Optimization(), math.inf)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "linaer"}, "linear, cosine, constant; got 'linaer'; did you mean 'linear'"),
        ({"lr": 0.0}, "lr must be above 0; got 0.0"),
        ({"lr": math.nan}, "lr must be above 0; got nan"),
        ({"head_lr": -1.0}, "head_lr must be above 0; got -1.0"),
        ({"warmup_ratio": 10}, "must lie in 0..1; got 10"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more; got -0.1"),
    ],
)
def test_settings_that_cannot_train_are_refused(settings, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        Optimization(**settings)
