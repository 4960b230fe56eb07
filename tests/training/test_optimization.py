"""Optimizer groups by role, and the learning rate by step."""

import logging
import math

import pytest
import tiny
import torch

from reft_lightning import attach
from reft_lightning.training import schedules
from reft_lightning.training.optimization import Optimization, parameter_groups


def groups(method="loreft", **settings):
    reft = attach(tiny.model("llama"), method, rank=4)
    return reft, {g["name"]: g for g in parameter_groups(reft.parameter_roles(), Optimization(**settings))}


def test_decay_acts_on_weights_and_never_on_rotations_or_biases():
    reft, found = groups(weight_decay=0.3)
    assert {name: group["weight_decay"] for name, group in found.items()} == {
        "rotation": 0.0,
        "weight": 0.3,
        "bias": 0.0,
    }
    grouped = [id(p) for group in found.values() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in reft.parameters() if p.requires_grad)


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
        reft, _ = groups()
        Optimization(weight_decay=0.3, lr=0.01).build(reft.parameter_roles(), 100)
    assert "optimizer group weight: 192 parameters, lr 0.01, weight decay 0.3" in caplog.text
    assert "optimizer group rotation: 192 parameters, lr 0.01, weight decay 0" in caplog.text


def rates(scheduler, steps, at):
    """The learning rates of a scheduler at some steps, starting from a rate of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, found = scheduler(optimizer), []
    for _ in range(steps + 1):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return [found[step] for step in at]


def test_the_rate_rises_linearly_and_then_falls_to_zero():
    found = rates(lambda o: schedules.linear(o, 100, 10), 100, (0, 5, 10, 55, 100))
    assert found == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_the_linear_schedule_is_that_of_transformers():
    from transformers import get_linear_schedule_with_warmup

    ours = rates(lambda o: schedules.linear(o, 23, 3), 23, range(24))
    theirs = rates(lambda o: get_linear_schedule_with_warmup(o, 3, 23), 23, range(24))
    assert ours == pytest.approx(theirs)


def test_the_cosine_schedule_passes_half_at_its_middle():
    found = rates(lambda o: schedules.cosine(o, 10), 10, (0, 1, 5, 10))
    assert found == pytest.approx([1, 0.5 * (1 + math.cos(math.pi / 10)), 0.5, 0])


def test_the_constant_schedule_stays_after_its_warm_up():
    assert rates(lambda o: schedules.constant(o, 2), 20, (0, 1, 2, 9, 20)) == [0, 0.5, 1, 1, 1]


def roles():
    return {"weight": [torch.nn.Parameter(torch.ones(2, 2))], "bias": [torch.nn.Parameter(torch.ones(2))]}


def test_the_warm_up_is_a_part_of_all_steps():
    optimizer, scheduler = Optimization(lr=1.0, warmup_ratio=0.25).build(roles(), 8)
    assert scheduler.get_last_lr() == [0, 0]
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [0.5, 0.5]


def test_any_optimizer_and_scheduler_of_torch_take_our_groups():
    settings = Optimization(
        lr=0.5, warmup_ratio=0, weight_decay=0.1, optimizer=torch.optim.SGD, optimizer_options={"momentum": 0.9},
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR,
    )  # fmt: skip
    optimizer, scheduler = settings.build(roles(), 10)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}
    assert scheduler.T_max == 10


def test_a_run_without_an_end_takes_a_schedule_that_needs_none():
    Optimization(scheduler=schedules.constant, warmup_ratio=0).build(roles(), math.inf)
    for settings in (Optimization(), Optimization(scheduler=schedules.constant)):
        with pytest.raises(ValueError, match=r"needs the total number of steps: set trainer\.max_steps"):
            settings.build(roles(), math.inf)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"optimizer_options": {"bta": 1}},
            "optimizer.options: AdamW does not take 'bta'; did you mean 'betas'",
        ),
        ({"scheduler_options": {"totl": 1}}, "scheduler.options: linear does not take 'totl'"),
        ({"optimizer": torch.optim.Rprop, "weight_decay": 0.1}, "Rprop does not support weight decay"),
        ({"scheduler": torch.optim.lr_scheduler.ConstantLR}, "ConstantLR does not support warm-up"),
        ({"lr": 0.0}, "lr must be above 0; got 0.0"),
        ({"lr": math.nan}, "lr must be above 0; got nan"),
        ({"head_lr": -1.0}, "head_lr must be above 0; got -1.0"),
        ({"warmup_ratio": 10}, "must be in 0..1; got 10"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0; got -0.1"),
    ],
)
def test_settings_that_cannot_train_are_refused(settings, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        Optimization(**settings)


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_a_rate_or_a_decay_among_the_options_would_not_count(name):
    with pytest.raises(ValueError, match=rf"optimizer\.options\.{name} .* set optimizer\.{name}=0\.1"):
        Optimization(optimizer_options={name: 0.1})
