"""An adapter belongs to the weights it was trained on: a run knows them when it is resumed, evaluated or compared."""

import logging
from dataclasses import replace

import pytest
import short_runs

from reft_lightning.config import compose
from reft_lightning.reporting.grouping import facts_of
from reft_lightning.reporting.runs import read_runs
from reft_lightning.runs import chat, experiment
from reft_lightning.runs.evaluate import evaluate


@pytest.fixture
def changed(data, tmp_path):
    """A finished and a stopped run of a model whose weights have changed since, and a run of the new ones."""
    config = compose.compose(
        ["model=local", f"model.path={tmp_path / 'model'}", *short_runs.arguments(data)[1:]]
    )
    short_runs.save_model(tmp_path / "model")
    experiment.run(config, tmp_path / "finished")
    with pytest.MonkeyPatch.context() as patch:
        short_runs.stop_at(patch, 7)
        with pytest.raises(short_runs.Stop):
            experiment.run(config, tmp_path / "stopped")
    short_runs.save_model(tmp_path / "model", 0.9)
    experiment.run(replace(config, seed=43), tmp_path / "other")
    return tmp_path


def test_a_base_model_that_has_changed_is_noticed(changed, caplog):
    with pytest.raises(experiment.SetupError, match=r"resume=.*: the base model has changed since the run"):
        experiment.resume(changed / "stopped")
    for later in (evaluate, chat.load):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            later(changed / "finished")
        assert "the base model has changed since the run in" in caplog.text
    found = read_runs([changed / "finished", changed / "other"])[0]
    assert len({facts_of(run, "test")[1] for run in found}) == 2
    caplog.clear()
    short_runs.save_model(changed / "model")
    evaluate(changed / "finished")
    experiment.resume(changed / "stopped")
    assert "the base model has changed" not in caplog.text
