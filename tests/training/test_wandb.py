"""W&B without a network: what a run leaves is read back from its own file."""

import json
import logging
import subprocess
import sys

import pytest
import short_runs

from reft_lightning.config.compose import compose
from reft_lightning.runs import trainer


def records(folder):
    """Return the records of the only W&B run in a run folder."""
    (run,) = (folder / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return run, [json.loads(line) for line in text.splitlines()]


def of(found, kind):
    return [record[kind] for record in found if record["type"] == kind]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return short_runs.write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def two_runs(data, tmp_path_factory):
    """Two runs of one process, one after the other."""
    folders = [tmp_path_factory.mktemp("wandb") / name for name in ("first", "second")]
    results = [
        short_runs.run(data, folder, "logger=wandb", f"seed={seed}", "logger.wandb.tags=[x]")
        for seed, folder in enumerate(folders)
    ]
    return [(folder, result, *records(folder)) for folder, result in zip(folders, results, strict=True)]


def summary_of(found):
    summary = {}
    for update in of(found, "summary"):
        summary |= update["update"]
    return summary


def test_each_run_of_a_process_has_its_own_file_and_configuration(two_runs):
    for seed, (_, _, _, found) in enumerate(two_runs):
        (run,) = of(found, "run")
        config = run["config"]["update"]
        assert config["seed"] == seed
        assert config["intervention"]["method"] == "loreft"
        assert config["optimizer"]["lr"] == 5e-3
        name = ("first", "second")[seed]
        assert run["display_name"] == f"loreft seed {seed} {name}"
        assert (run["run_group"], run["job_type"]) == (two_runs[seed][0].parent.name, "train")
        assert run["tags"] == ["x", "loreft", "tiny_random", "commonsense"]
        assert of(found, "exit")[0].get("exit_code", 0) == 0
    assert two_runs[0][2].name != two_runs[1][2].name


def test_losses_rates_and_scores_are_there_by_step(two_runs):
    for folder, _, _, found in two_runs:
        history = [record["item"] for record in of(found, "history")]

        def curve(name, history=history):
            return {item["trainer/global_step"]: item[name] for item in history if name in item}

        assert len(curve("train/loss")) == 12
        assert curve("train/loss") == pytest.approx(short_runs.logged(folder, "train/loss"))
        assert curve("lr-AdamW/weight") == pytest.approx(short_runs.logged(folder, "lr-AdamW/weight"))
        assert len(curve("train/tokens_per_second")) == 12
        assert min(curve("train/tokens_per_second").values()) > 0
        assert {"val/loss", "val/accuracy", "val/boolq/accuracy", "test/boolq/accuracy"} <= {
            name for item in history for name in item
        }


def test_the_summary_holds_the_results(two_runs):
    for _, results, _, found in two_runs:
        summary = summary_of(found)
        assert summary["trainable_parameters"] == results["trainable_parameters"]
        assert summary["status"] == "complete"
        assert summary["metrics"]["test/accuracy"] == results["metrics"]["test/accuracy"]


def test_predictions_are_tables(two_runs):
    for folder, _, run, found in two_runs:
        summary = summary_of(found)
        table = json.loads((run / "files" / summary["test/predictions.path"]).read_text())
        rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        expected = short_runs.predictions(folder, "reft_test")
        assert [row["generated"] for row in rows] == [row["generated"] for row in expected]
        assert {"task", "prompt", "gold", "answer", "option"} <= set(table["columns"])
        assert (run / "files" / summary["val/predictions.path"]).is_file()


def test_the_adapter_is_an_artifact(two_runs):
    for folder, _, _, found in two_runs:
        text = json.dumps([record for record in found if "adapter-" in json.dumps(record)])
        assert "reft.safetensors" in text
        assert "reft_config.json" in text
        assert (folder / "adapter" / "reft.safetensors").is_file()


def test_a_run_that_stops_is_closed_as_failed(data, tmp_path, monkeypatch):
    short_runs.stop_at(monkeypatch, 2)
    with pytest.raises(short_runs.Stop):
        short_runs.run(data, tmp_path, "logger=wandb")
    import wandb

    assert wandb.run is None
    _, found = records(tmp_path)
    assert of(found, "exit")[0]["exit_code"] == 1
    assert summary_of(found)["status"] == "stopped"


def test_a_resumed_run_continues_its_run(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        short_runs.stop_at(patch, 2)
        with pytest.raises(short_runs.Stop):
            short_runs.run(data, tmp_path, "logger=wandb")
    short_runs.run(data, tmp_path, "logger=wandb", f"resume={tmp_path}")
    ids = [folder.name.rpartition("-")[2] for folder in (tmp_path / "wandb").glob("offline-run-*")]
    assert ids == [short_runs.results(tmp_path)["wandb_run"]] * 2
    (_, logger) = trainer.build_loggers(wandb(f"resume={tmp_path}", "logger.wandb.mode=disabled"), tmp_path)
    assert (logger.version, logger._wandb_init["resume"]) == (ids[0], "allow")


def test_names_that_are_given_are_kept_and_long_tags_are_cut(tmp_path):
    names = {"name": "n", "group": "g", "job_type": "j"}
    given = [f"logger.wandb.{key}={value}" for key, value in names.items()]
    (_, logger) = trainer.build_loggers(wandb(*given, f"model.name={'x' * 100}"), tmp_path)
    assert {key: logger._wandb_init[key] for key in ("group", "job_type")} == {"group": "g", "job_type": "j"}
    assert logger._wandb_init["name"] == "n"
    assert logger._wandb_init["tags"][1] == "x" * 64


def wandb(*overrides):
    return compose(["model=tiny_random", "logger=wandb", *overrides])


def test_without_a_key_a_run_is_offline_and_says_how_to_upload_it(tmp_path, monkeypatch, caplog):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with caplog.at_level(logging.INFO, "reft_lightning.runs.trainer"):
        (_, logger) = trainer.build_loggers(wandb(), tmp_path / "run")
    assert logger._wandb_init["mode"] == "offline"
    assert "wandb sync" in caplog.text
    assert str(tmp_path / "run") in caplog.text


def test_with_a_key_a_run_is_online(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    (_, logger) = trainer.build_loggers(wandb(), tmp_path)
    assert logger._wandb_init["mode"] == "online"


def test_the_configuration_chooses_the_mode_before_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    (_, logger) = trainer.build_loggers(wandb("logger.wandb.mode=disabled"), tmp_path)
    assert logger._wandb_init["mode"] == "disabled"
