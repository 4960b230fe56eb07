"""The callback that logs edit norms during training."""

import logging

import pytest
import short_runs
import torch

from reft_lightning.adapters.reft.measuring import EditNorms, watching
from reft_lightning.config import compose
from reft_lightning.inspection import edit_norms
from reft_lightning.runs import experiment


def train(data, folder, *overrides):
    return short_runs.run(data, folder, "test=false", "trainer.max_epochs=1", *overrides)


def test_norms_are_logged_at_logged_steps_and_change_nothing(data, tmp_path):
    every_two = "trainer.log_every_n_steps=2"
    with_it = train(data, tmp_path / "with", "callbacks=edit_norms", every_two)
    without = train(data, tmp_path / "without", every_two)
    for name in ("edit/layer_00", "edit/layer_01", "edit/mean"):
        logged = short_runs.logged(tmp_path / "with", name)
        assert list(logged) == list(short_runs.logged(tmp_path / "with", "train/loss")) == [1, 3, 5]
        assert all(value > 0 for value in logged.values())
        assert len(set(logged.values())) == 3
    for name in ("train/loss", "val/loss"):
        assert with_it["metrics"][name] == without["metrics"][name]


def test_the_norm_is_that_of_the_training_batch(data, tmp_path, monkeypatch):
    objects = short_runs.build(data, "trainer.max_epochs=1")
    batch = next(iter(objects.data.train_dataloader()))
    expected = EditNorms(objects.model)
    with torch.no_grad(), watching(objects.model, expected):
        objects.module.loss_of(batch)
    train(data, tmp_path, "callbacks=edit_norms")
    first = {name: short_runs.logged(tmp_path, f"edit/layer_0{name}")[0] for name in (0, 1)}
    assert first == pytest.approx({layer: float(value) for layer, value in expected.by_layer().items()})


def test_accumulated_batches_are_one_measurement(data, tmp_path):
    train(data, tmp_path, "callbacks=edit_norms", "trainer.accumulate_grad_batches=2")
    logged = short_runs.logged(tmp_path, "edit/mean")
    assert list(logged) == list(short_runs.logged(tmp_path, "train/loss"))


def test_a_method_without_interventions_is_told_once(data, tmp_path, caplog):
    pytest.importorskip("peft")
    settings = short_runs.without_interventions(data)
    lora = ["intervention=peft/lora", "intervention.options.r=2", "test=false", "trainer.max_epochs=1"]
    with caplog.at_level(logging.WARNING, edit_norms.__name__):
        experiment.run(compose.compose([*settings, *lora, "callbacks=edit_norms"]), tmp_path)
    said = [r.getMessage() for r in caplog.records if r.name == edit_norms.__name__]
    assert said == ["callbacks: edit norms are not logged, as peft/lora has no interventions"]


def test_nothing_watches_after_training_that_failed(data, tmp_path, monkeypatch):
    short_runs.stop_at(monkeypatch, batch=2)
    seen = []
    original = edit_norms.watching
    monkeypatch.setattr(edit_norms, "watching", lambda reft, see: seen.append(reft) or original(reft, see))
    with pytest.raises(short_runs.Stop):
        train(data, tmp_path, "callbacks=edit_norms")
    assert len(seen) == 3
    assert not any(phi._forward_hooks for group in seen[-1].interventions.values() for phi in group)
