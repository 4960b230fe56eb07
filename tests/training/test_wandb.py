"""W&B without a network: the contents of a run are read back from its file."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import short_runs
import torch
import wandb as wandb_library
from lightning import Callback
from lightning.pytorch.loggers import WandbLogger

from reft_lightning.config.compose import compose
from reft_lightning.runs import experiment, trainer
from reft_lightning.runs.evaluate import evaluate
from reft_lightning.training import wandb as reporting
from reft_lightning.training.best_checkpoint import BestCheckpoint
from reft_lightning.training.wandb import WandbReport, data_artifact, finish_wandb, with_base


def records(folder):
    """Return the records of the only W&B run in a run folder."""
    (run,) = (folder / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return run, [json.loads(line) for line in text.splitlines()]


def of(found, kind):
    return [record[kind] for record in found if record["type"] == kind]


@pytest.fixture(scope="module")
def two_runs(data, tmp_path_factory):
    """Two runs of one process, one after the other."""
    folders = [tmp_path_factory.mktemp("wandb") / name for name in ("first", "second")]
    results = [
        short_runs.run(
            data, folder, "logger=wandb", f"seed={seed}", "logger.wandb.tags=[x]", "evaluate_base=true"
        )
        for seed, folder in enumerate(folders)
    ]
    return [(folder, result, *records(folder)) for folder, result in zip(folders, results, strict=True)]


def summary_of(found):
    """Return the summary; the parts of a nested value have dotted names."""
    summary = {}
    for update in of(found, "summary"):
        summary |= update["update"]
    return summary


def histories(found):
    return [record["item"] for record in of(found, "history")]


def table_of(run, found, name):
    table = json.loads((run / "files" / summary_of(found)[f"{name}.path"]).read_text())
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def test_each_run_of_a_process_has_its_own_file_and_names(two_runs):
    for seed, (folder, _, _, found) in enumerate(two_runs):
        (run,) = of(found, "run")
        assert run["config"]["update"]["seed"] == seed
        assert run["display_name"] == f"loreft seed={seed} {folder.name}"
        assert (run["run_group"], run["job_type"]) == (folder.parent.name, "train")
        assert run["tags"] == ["x", "loreft", "tiny_random", "commonsense"]
        assert of(found, "exit")[0].get("exit_code", 0) == 0
    assert two_runs[0][2].name != two_runs[1][2].name


def test_the_configuration_holds_what_identifies_the_run_and_nothing_empty(two_runs):
    _, results, _, found = two_runs[0]
    config = of(found, "run")[0]["config"]["update"]
    assert (config["method"], config["config_hash"]) == ("loreft", results["config_hash"])
    assert config["intervention"]["rank"] == 2
    assert config["intervention"]["dropout"] == 0
    assert config["optimizer"]["lr"] == 5e-3
    kept = {"max_epochs": 2, "gradient_clip_val": 1, "precision": "32-true"}
    assert config["trainer"] == {**kept, "devices": 1, "num_sanity_val_steps": 0}  # not Lightning's defaults
    assert not {"logger", "evaluate_base", "kept", "resume"} & set(config)
    assert "path" not in config["data"]

    def values(section):
        for value in section.values():
            yield from values(value) if isinstance(value, dict) else [value]

    assert not any(value is None or value is False or value in ([], {}, "") for value in values(config))


def test_losses_rates_and_scores_are_there_by_step(two_runs):
    for folder, _, _, found in two_runs:
        history = histories(found)

        def curve(name, history=history):
            return {item["trainer/global_step"]: item[name] for item in history if name in item}

        assert len(curve("train/loss")) == 12
        assert curve("train/loss") == pytest.approx(short_runs.logged(folder, "train/loss"))
        assert curve("progress/lr/weight") == pytest.approx(short_runs.logged(folder, "progress/lr/weight"))
        assert len(curve("train/tokens_per_second")) == 12
        assert min(curve("train/tokens_per_second").values()) > 0
        names = {name for item in history for name in item}
        assert {"val/loss", "val/accuracy", "val/boolq/accuracy", "test/boolq/accuracy"} <= names
        assert "base/test/accuracy" in names


def test_every_curve_lies_in_a_section_and_has_the_same_axis(two_runs):
    _, _, _, found = two_runs[0]
    names = {name for item in histories(found) for name in item}
    sections = {name.partition("/")[0] for name in names if not name.startswith("_")}
    assert sections == {"train", "val", "test", "base", "progress", "trainer", "epoch"}
    assert all("trainer/global_step" in item for item in histories(found))
    axes = {metric.get("step_metric") for metric in of(found, "metric")}
    assert axes == {None, "trainer/global_step"}  # None: of the axis itself


def test_the_summary_holds_the_results_and_the_best_validation(two_runs):
    for _, results, _, found in two_runs:
        summary = summary_of(found)
        assert summary["trainable_parameters"] == results["trainable_parameters"]
        assert summary["status"] == "complete"
        assert summary["test/accuracy"] == results["metrics"]["test/accuracy"]
        losses = [item["val/loss"] for item in histories(found) if "val/loss" in item]
        scores = [item["val/accuracy"] for item in histories(found) if "val/accuracy" in item]
        assert summary["val/loss"] == {"min": min(losses)}
        assert summary["val/accuracy"] == {"max": max(scores)}
        assert summary["best_step"] == results["best_step"]
        assert summary["final/val/loss"] == results["metrics"]["val/loss"]
        assert not {"metrics", "counts", "versions", "test_reads"} & {
            name.partition(".")[0] for name in summary
        }


def test_the_table_of_predictions_sets_the_adapter_next_to_the_base(two_runs):
    for folder, _, run, found in two_runs:
        rows = table_of(run, found, "test/predictions")
        after, before = (short_runs.predictions(folder, name) for name in ("reft_test", "base_test"))
        for name, expected in (("", after), ("base_", before)):
            assert [row[f"{name}generated"] for row in rows] == [row["generated"] for row in expected]
            assert [row[f"{name}correct"] for row in rows] == [row["correct"] for row in expected]
        pairs = zip(after, before, strict=True)
        assert [row["changed"] for row in rows] == [one["answer"] != other["answer"] for one, other in pairs]
        assert {"task", "prompt", "gold", "answer", "option", "base_option"} <= set(rows[0])
        assert "changed" not in table_of(run, found, "val/predictions")[0]  # the base read test rows only
        assert "base/test/predictions.path" not in summary_of(found)


def test_the_adapter_is_an_artifact_that_names_where_it_comes_from(two_runs):
    for folder, results, _, found in two_runs:
        (artifact,) = [record for record in of(found, "artifact") if record["type"] == "model"]
        files = {entry["path"] for entry in artifact["manifest"]["contents"]}
        assert {"reft.safetensors", "reft_config.json"} <= files
        facts = json.loads(artifact["metadata"])
        assert facts["run"] == results["wandb_run"]
        for name in ("config_hash", "model", "data_versions", "best_step"):
            assert facts[name] == results[name]
        assert facts["scores"]["test/accuracy"] == results["metrics"]["test/accuracy"]
        assert (folder / "adapter" / "reft.safetensors").is_file()


def test_equal_data_is_one_artifact(two_runs):
    digests = [data_artifact(results).digest for _, results, _, _ in two_runs]
    other = {"data_versions": {**two_runs[0][1]["data_versions"], "split_seed": 7}}
    assert digests[0] == digests[1] != data_artifact(other).digest


def test_rows_of_one_source_are_set_next_to_each_other_in_their_order():
    def row(answer):
        return {"task": "t", "source": "s", "answer": answer, "correct": answer == "b", "scores": {}}

    base = {("t", "s", i): row(answer) for i, answer in enumerate("ab")}
    shown = with_base([row("b"), row("b"), row("c")], base)
    assert [line.get("base_answer") for line in shown] == ["a", "b", None]
    assert [line.get("changed") for line in shown] == [True, False, None]


def test_where_texts_are_free_every_row_has_its_loss_and_the_table_shows_those_that_are_generated(tmp_path):
    place = Path(__file__).parents[1] / "fixtures" / "instruction"
    overrides = [
        "model=tiny_random", "data=ultrafeedback", "data.source=local", f"data.path='{place}'",
        "data.train_tasks=null", "data.tasks=[ultrafeedback_binarized]", "data.validation_size=2",
        "data.max_length=160", "data.eval_batch_size=1", "intervention=bias", "trainer.accelerator=cpu",
        "trainer.max_epochs=1", "trainer.enable_progress_bar=false", "decoding.max_new_tokens=2", "logger=wandb",
    ]  # fmt: skip
    results = experiment.run(compose(overrides), tmp_path)
    rows = short_runs.predictions(tmp_path, "reft_validation")
    assert ["generated" in row for row in rows] == [True, False]  # some of the first batch, which is one row
    tokens = [row["target_tokens"] for row in rows]
    total = sum(row["scores"]["loss"] * count for row, count in zip(rows, tokens, strict=True))
    assert total / sum(tokens) == pytest.approx(results["metrics"]["val/loss"], rel=1e-5)
    run, found = records(tmp_path)
    assert [line["source"] for line in table_of(run, found, "val/predictions")] == [rows[0]["source"]]


def test_an_evaluation_is_filed_in_the_group_of_its_run(two_runs):
    folder, _, _, found = two_runs[0]
    results = evaluate(folder, "test", limit=4)
    (target,) = (folder / "evaluations").iterdir()
    run, evaluated = records(target)
    first, second = of(found, "run")[0], of(evaluated, "run")[0]
    assert (second["run_group"], second["job_type"]) == (first["run_group"], "eval")
    assert second["display_name"] == f"{first['display_name']}, test"
    assert second["run_id"] != first["run_id"]
    assert second["config"]["update"]["intervention"] == first["config"]["update"]["intervention"]
    assert summary_of(evaluated)["test/accuracy"] == results["metrics"]["test/accuracy"]
    rows = table_of(run, evaluated, "test/predictions")
    assert len(rows) == 4
    assert {"base_answer", "changed"} <= set(rows[0])


def test_a_loss_that_is_no_longer_a_number_raises_an_alert_and_closes_the_run_as_failed(data, tmp_path):
    with pytest.raises(FloatingPointError):
        short_runs.run(data, tmp_path, "logger=wandb", "optimizer.lr=1e20", "scheduler.warmup_ratio=0")
    _, found = records(tmp_path)
    (alert,) = of(found, "alert")
    assert (alert["title"], alert["level"]) == ("NaN", "ERROR")
    assert "lower optimizer.lr" in alert["text"]
    assert summary_of(found)["status"] == "failed"
    assert of(found, "exit")[0]["exit_code"] == 1
    assert wandb_library.run is None


def test_training_that_stays_worse_than_it_began_raises_one_alert(tmp_path):
    loggers = trainer.build_loggers(wandb(), tmp_path)
    report = WandbReport(tmp_path, "val/accuracy", "max")
    losses = [2.0] * 10 + [1.0] * 20 + [2.9] * 20 + [4.0] * 20
    for step, loss in enumerate(losses, 1):
        part = SimpleNamespace(
            global_step=step, log_every_n_steps=1, is_global_zero=True, loggers=loggers,
            callback_metrics={"train/loss": torch.tensor(loss)},
        )  # fmt: skip
        report.on_train_batch_end(part, None, None, None, 0)
    finish_wandb(loggers, {"status": "complete"})
    _, found = records(tmp_path)
    (alert,) = of(found, "alert")
    assert (alert["title"], alert["level"]) == ("training diverges", "WARN")
    assert alert["text"].startswith("step 51: ")


class Interrupt(Callback):
    """Stop the run as a user does."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 8:
            raise KeyboardInterrupt


def test_a_run_that_is_told_to_stop_is_killed_and_not_failed(data, tmp_path):
    with pytest.raises(SystemExit):
        experiment.run(short_runs.config(data, "logger=wandb"), tmp_path, callbacks=[Interrupt()])
    _, found = records(tmp_path)
    assert of(found, "exit")[0]["exit_code"] == 130
    assert summary_of(found)["status"] == "killed"
    assert summary_of(found)["best_step"] == 6


def test_a_resumed_run_continues_its_run(data, tmp_path):
    short_runs.interrupt(data, tmp_path, 2, "logger=wandb")
    short_runs.run(data, tmp_path, "logger=wandb", f"resume={tmp_path}")
    # offline-run-TIME-ID, followed by a number if both began in the same second
    ids = [folder.name.split("-")[3] for folder in (tmp_path / "wandb").glob("offline-run-*")]
    assert ids == [short_runs.results(tmp_path)["wandb_run"]] * 2
    (_, logger) = trainer.build_loggers(wandb(f"resume={tmp_path}", "logger.wandb.mode=disabled"), tmp_path)
    assert (logger.version, logger._wandb_init["resume"]) == (ids[0], "allow")


def test_the_best_validation_of_a_resumed_run_may_lie_in_its_first_part(tmp_path, monkeypatch):
    best = BestCheckpoint(tmp_path / "best.ckpt", "val/accuracy", "max")
    best.load_state_dict({"validations": [(2, 0.5, float("nan")), (4, 0.9, 0.2), (6, 0.7, 0.1)]})
    run = SimpleNamespace(summary={})
    monkeypatch.setattr(reporting, "_runs", lambda trainer: [run])
    WandbReport(tmp_path, "val/accuracy", "max").on_train_end(
        SimpleNamespace(checkpoint_callbacks=[best]), None
    )
    assert run.summary == {"best_step": 4, "val/accuracy": {"max": 0.9}, "val/loss": {"min": 0.1}}


def test_what_wandb_cannot_take_during_a_run_is_a_warning(data, tmp_path, caplog, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(WandbLogger, "log_table", unreachable)
    results = short_runs.run(data, tmp_path, "logger=wandb", "trainer.max_epochs=1")
    assert results["status"] == "complete"
    assert "could not send the table val/predictions to W&B: ConnectionError: no route to host" in caplog.text


def test_names_that_are_given_are_kept_and_long_tags_are_cut(tmp_path):
    names = {"name": "n", "group": "g", "job_type": "j"}
    given = [f"logger.wandb.{key}={value}" for key, value in names.items()]
    (_, logger) = trainer.build_loggers(wandb(*given, f"model.name={'x' * 100}"), tmp_path)
    assert {key: logger._wandb_init[key] for key in ("group", "job_type")} == {"group": "g", "job_type": "j"}
    assert logger._wandb_init["name"] == "n"
    assert logger._wandb_init["tags"][1] == "x" * 64


def wandb(*overrides):
    return compose(["model=tiny_random", "logger=wandb", *overrides])


KEY = "x" * 40


@pytest.fixture
def anew(tmp_path, monkeypatch):
    """W&B as in a new process for a user without a key."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(home / "config"))
    wandb_library.teardown()
    yield home
    wandb_library.teardown()


def test_without_a_key_a_run_is_offline_and_says_how_to_upload_it(tmp_path, anew, caplog):
    with caplog.at_level(logging.INFO, "reft_lightning.runs.wandb_names"):
        (_, logger) = trainer.build_loggers(wandb(), tmp_path / "run")
    assert logger._wandb_init["mode"] == "offline"
    assert "wandb sync" in caplog.text
    assert str(tmp_path / "run") in caplog.text


def mode_of(folder):
    (_, logger) = trainer.build_loggers(wandb(), folder)
    return logger._wandb_init["mode"]


def test_with_a_key_a_run_is_online(tmp_path, anew, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert mode_of(tmp_path) == "online"


@pytest.mark.parametrize(("offline", "disabled", "expected"), [
    (False, False, "online"), (True, False, "offline"), (False, True, "offline"),
])  # fmt: skip
def test_next_to_an_open_run_a_run_has_its_mode(tmp_path, anew, monkeypatch, offline, disabled, expected):
    monkeypatch.setattr(wandb_library, "run", SimpleNamespace(offline=offline, disabled=disabled))
    assert mode_of(tmp_path) == expected


@pytest.mark.parametrize(
    ("place", "server", "machine", "expected"),
    [
        ("home", None, "api.wandb.ai", "online"),
        ("NETRC", None, "api.wandb.ai", "online"),
        ("home", "http://wandb.example:8080", "wandb.example:8080", "online"),  # self-hosted
        ("home", "https://wandb.example/", "wandb.example", "online"),
        ("NETRC", "https://wandb.example", "api.wandb.ai", "offline"),  # a key for another server
        ("home", None, "github.com", "offline"),
    ],
)
def test_a_key_in_a_netrc_file_counts_for_its_server(
    tmp_path, anew, monkeypatch, place, server, machine, expected
):
    file = anew / ".netrc"
    if place == "NETRC":
        file = tmp_path / "mine"
        monkeypatch.setenv("NETRC", str(file))
    file.write_text(f"machine {machine}\n  login user\n  password {KEY}\n")
    if server:
        monkeypatch.setenv("WANDB_BASE_URL", server)
    assert mode_of(tmp_path / "run") == expected


def test_a_server_that_wandb_login_keeps_in_its_settings_counts(tmp_path, anew):
    (anew / "config").mkdir()
    (anew / "config" / "settings").write_text("[default]\nbase_url = https://wandb.example\n")
    (anew / ".netrc").write_text(f"machine wandb.example\n  login user\n  password {KEY}\n")
    assert mode_of(tmp_path / "run") == "online"


def test_a_key_that_cannot_be_one_is_refused(tmp_path, anew, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(ValueError, match=r"W&B key cannot be used: .*WANDB_API_KEY.*WANDB_MODE=offline"):
        mode_of(tmp_path)


def test_the_configuration_chooses_the_mode_before_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    for override, mode in (
        ("logger.wandb.mode=disabled", "disabled"),
        ("+logger.wandb.offline=true", "offline"),
    ):
        (_, logger) = trainer.build_loggers(wandb(override), tmp_path)
        assert logger._wandb_init["mode"] == mode


def test_what_fails_at_the_end_of_a_wandb_run_is_a_warning(tmp_path, caplog, monkeypatch):
    (_, logger) = trainer.build_loggers(wandb("logger.wandb.mode=disabled"), tmp_path)

    def unreachable(exit_code):
        raise ConnectionError("no route to host")

    with monkeypatch.context() as patch:
        patch.setattr(logger.experiment, "finish", unreachable)
        finish_wandb([logger], {"status": "complete"})
    assert "could not send the end of the run to W&B: ConnectionError: no route to host" in caplog.text
    logger.experiment.finish()  # otherwise the next tests would use the open run


def test_a_run_does_not_wait_for_ever_for_a_network_that_is_gone(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_FINISH_TIMEOUT", raising=False)
    (_, logger) = trainer.build_loggers(wandb("logger.wandb.mode=disabled"), tmp_path)
    assert logger._wandb_init["settings"] == {"finish_timeout": 600}
    (_, logger) = trainer.build_loggers(
        wandb("logger.wandb.mode=disabled", "+logger.wandb.settings.finish_timeout=9"), tmp_path
    )
    assert logger._wandb_init["settings"] == {"finish_timeout": 9}
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "5")
    (_, logger) = trainer.build_loggers(wandb("logger.wandb.mode=disabled"), tmp_path)
    assert "settings" not in logger._wandb_init
