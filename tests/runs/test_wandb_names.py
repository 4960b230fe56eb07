"""How a run is organised in W&B: its name says how it differs from the others of its group."""

import os

import pytest

from reft_lightning.config import compose
from reft_lightning.runs.trainer import build_loggers
from reft_lightning.runs.wandb_names import filed, label, wandb_arguments

TINY = ["model=tiny_random", "logger=wandb", "logger.wandb.mode=disabled"]


def composed(*overrides):
    return compose.compose([*TINY, *overrides])


def test_a_name_holds_method_what_was_set_and_seed():
    overrides = [
        "model=tiny_random",
        "data=boolq",
        "intervention=direft",
        "optimizer.lr=1e-3",
        "seed=7",
        "test=false",
    ]
    config = composed(*overrides[1:])
    assert label(config, overrides) == "direft tiny_random boolq lr=1e-3 seed=7"
    assert label(config, ["optimizer.lr=1e-3"], "mine") == "mine lr=1e-3 seed=7"


def test_what_does_not_identify_a_run_is_no_part_of_its_name(tmp_path):
    overrides = [
        "logger=wandb",
        "trainer.accelerator=cpu",
        f"data.path={tmp_path}",
        "+callbacks.x._target_=y",
    ]
    assert label(composed("data.source=local", f"data.path={tmp_path}"), overrides) == "loreft seed=42"


def test_a_long_name_is_cut_to_what_wandb_takes_and_keeps_its_seed():
    names = [label(composed(f"seed={n}"), [f"intervention.positions={'f1+' * 100}l1"]) for n in (1, 2)]
    assert [len(name) for name in names] == [128, 128]
    assert [name[-7:] for name in names] == [" seed=1", " seed=2"]


def test_names_are_filled_in_where_the_configuration_gives_none():
    names = {"group": "study", "job_type": "trial", "name": "loreft lr=1e-3 seed=42"}
    config = filed(composed("logger=[wandb,tensorboard]", "logger.wandb.group=mine"), **names)
    entry = config.logger["wandb"]
    assert {name: entry[name] for name in names} == {**names, "group": "mine"}
    assert "group" not in config.logger["tensorboard"]


def test_the_jobs_of_a_sweep_are_one_group(tmp_path):
    entry = composed().logger["wandb"]

    def group(folder):
        return wandb_arguments(entry, composed(), tmp_path / folder)[0]["group"]

    assert group("few/multirun_2026-11-29_12-00-00/0_seed=1") == "few/multirun_2026-11-29_12-00-00"
    assert group("few/2026-11-29_12-00-00") == "few"


def test_a_run_of_an_agent_is_the_one_that_the_agent_began(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "abc12345")
    (_, logger) = build_loggers(composed(), tmp_path)
    assert logger.version == "abc12345"


def test_settings_that_mean_nothing_to_the_method_are_not_shown(tmp_path):
    config = composed("intervention=peft/lora")
    _, given = wandb_arguments(config.logger["wandb"], config, tmp_path)
    shown = given["config"]
    assert shown["method"] == "peft/lora"
    assert set(shown["intervention"]) == {"method", "options"}
    assert shown["intervention"]["options"]["r"] == config.intervention.options["r"]


def test_one_tag_is_a_tag_and_not_its_letters(tmp_path):
    config = composed("logger.wandb.tags=draft")
    assert wandb_arguments(config.logger["wandb"], config, tmp_path)[0]["tags"][0] == "draft"


def test_an_entry_that_is_null_says_what_it_needs(tmp_path):
    config = filed(composed("logger.wandb=null"), name="mine")
    with pytest.raises(ValueError, match=r"logger\.wandb needs a _target_"):
        build_loggers(config, tmp_path)


def test_a_user_without_a_home_folder_is_told_that_wandb_needs_one(monkeypatch, tmp_path):
    config = composed()
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)  # has no entry in the list of users
    with pytest.raises(ValueError, match="no home folder, which W&B needs: set HOME to a folder"):
        build_loggers(config, tmp_path)
