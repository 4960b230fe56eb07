"""Studies whose trials are real runs: what they read, what they spend, how they end; also through the command."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import short_runs
import yaml
from real_searches import contents, make_study, opened, start, work

from reft_lightning.config import compose
from reft_lightning.runs import experiment
from reft_lightning.runs.evaluate import evaluate
from reft_lightning.search.budget import counted, spent
from reft_lightning.search.study import Study
from reft_lightning.search.study_files import read_job
from reft_lightning.search.summary import summarize
from reft_lightning.search.trial import run_job


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows of this module alone, whose test rows are made unreadable for a while."""
    return short_runs.write_rows(tmp_path_factory.mktemp("rows"))


def results_of(study, number, method="loreft"):
    return short_runs.results(study.folder / "trials" / method / str(number))


@pytest.fixture(scope="module")
def searched(data, tmp_path_factory):
    """A study whose search phase ran while the test rows were unreadable, and every file that it opened."""
    (test_file,) = data.glob("*/test.json")
    rows = test_file.read_text()
    test_file.write_text("these are no rows")
    try:
        with opened() as files:
            values = contents(data)
            values["base"] += ["evaluate_base=true"]
            study = make_study(tmp_path_factory.mktemp("study"), values)
            work(study)
    finally:
        test_file.write_text(rows)
    return study, files


@pytest.fixture(scope="module")
def won(data, tmp_path_factory):
    """A study of one trial and its winner, both logged to W&B, and every file that it opened."""
    values = contents(data, seeds=[7], budget={"unit": "trials", "amount": 1})
    values["base"] += ["logger=wandb", "logger.wandb.mode=offline"]
    study = make_study(tmp_path_factory.mktemp("won") / "mine", values)
    with opened() as files:
        work(study)
    return study, files


# --- the test split is sealed


def assert_untested(study, number):
    results, folder = results_of(study, number), study.folder / "trials" / "loreft" / str(number)
    assert results["test_reads"] == []
    assert not [name for name in results["metrics"] if "test" in name]
    assert not list(folder.glob("predictions/*test*"))
    assert list(folder.glob("predictions/*")) or results["status"] == "pruned"


def test_a_search_opens_no_file_of_test_rows(searched, data):
    study, files = searched
    assert [t.state.name for t in study.trials("loreft")] == ["COMPLETE", "COMPLETE"]
    assert str(data / "boolq" / "train.json") in files  # what is opened is seen
    assert str(data / "boolq" / "test.json") not in files
    for number in range(2):
        assert_untested(study, number)
        assert any(name.startswith("base/val/") for name in results_of(study, number)["metrics"])
    assert not (study.folder / "test_reads.jsonl").exists()


def test_the_winner_is_tested_and_every_read_is_written_down(won, data):
    study, files = won
    assert str(data / "boolq" / "test.json") in files
    (read,) = summarize(study)["test_reads"]
    results = short_runs.results(study.folder / "winners" / "loreft" / "seed_7")
    assert (read["method"], read["seed"], read["config_hash"]) == ("loreft", 7, results["config_hash"])
    assert [r["config_hash"] for r in results["test_reads"]] == [results["config_hash"]]
    assert results["seed"] == 7
    assert "test/accuracy" in results["metrics"]
    assert read["time"] <= results["test_reads"][0]["time"]


def test_trials_and_winners_are_one_group_of_wandb(won):
    study, _ = won
    for place, kind, name in (
        ("trials/loreft/0", "trial", r"loreft .*lr=.* seed=42"),
        ("winners/loreft/seed_7", "winner", "loreft seed=7"),
    ):
        (run,) = [record["run"] for record in logged(study.folder / place) if record["type"] == "run"]
        assert (run["run_group"], run["job_type"]) == ("mine", kind)
        assert re.fullmatch(name, run["display_name"])


def logged(folder):
    """Return the records of the first W&B run in a run folder."""
    run, *_ = sorted((folder / "wandb").glob("offline-run-*"))
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return [json.loads(line) for line in text.splitlines()]


def test_a_winner_that_was_stopped_after_its_test_reads_no_test_row_again(won, data):
    study, _ = won
    winner = study.folder / "winners" / "loreft" / "seed_7"
    before = short_runs.results(winner)
    (winner / "results.json").write_text(json.dumps(before | {"status": "stopped"}))
    assert summarize(study)["status"] == "running"
    with opened() as files:
        work(Study(study.folder))
    after = short_runs.results(winner)
    assert str(data / "boolq" / "test.json") not in files
    assert (after["status"], after["test_reads"]) == ("complete", before["test_reads"])
    assert after["metrics"]["test/accuracy"] == before["metrics"]["test/accuracy"]
    assert len(summarize(study)["test_reads"]) == 1


def test_the_module_of_a_sealed_run_builds_no_test_split(data):
    objects = short_runs.build(data, "sealed=true")
    with pytest.raises(PermissionError, match="the test split is sealed"):
        objects.data.setup("test")
    with pytest.raises(PermissionError, match="the test split is sealed"):
        objects.data.test_dataloader()


def test_a_trial_that_is_not_sealed_does_not_run(searched, tmp_path):
    study, _ = searched
    job = read_job(study.folder / "trials" / "loreft" / "0")
    job["overrides"] = [o for o in job["overrides"] if o != "sealed=true"]
    (tmp_path / "job.json").write_text(json.dumps(job))
    with pytest.raises(ValueError, match="a trial must be sealed"):
        run_job(study.folder, tmp_path)


def test_the_test_split_of_a_trial_cannot_be_evaluated_later(searched):
    study, _ = searched
    with pytest.raises(ValueError, match="part of a search, whose test split is sealed"):
        evaluate(study.folder / "trials" / "loreft" / "0", "test")


# --- trials


def test_a_trial_is_repeated_by_its_command_alone(searched, tmp_path):
    study, _ = searched
    trial = study.trials("loreft")[-1]
    words = shlex.split((study.folder / trial.user_attrs["folder"] / "command.txt").read_text())
    results = experiment.run(compose.compose(words[words.index("reft-train") + 1 :]), tmp_path)
    assert results["metrics"]["val/loss"] == trial.value
    assert results["config_hash"] == trial.user_attrs["config_hash"]


def test_what_a_trial_spent_is_what_its_run_says(searched):
    study, _ = searched
    for trial in study.trials("loreft"):
        cost, results = trial.user_attrs["cost"], results_of(study, trial.number)
        assert (cost["steps"], cost["tokens"]) == (results["steps"], results["tokens"])
        assert cost["steps"] == 12
        # two clocks on one fit; a second for what the machine does between their hooks
        folder = study.folder / trial.user_attrs["folder"]
        last = max(short_runs.logged(folder, "progress/seconds").values())
        assert 0 < last < cost["seconds"] < results["train_seconds"] + 1
        assert len(trial.intermediate_values) == 2  # epochs


def test_a_trial_that_cannot_run_fails_and_the_study_goes_on(data, tmp_path):
    space = {"intervention.rank": {"choice": [2, 999]}}  # wider than the model
    values = contents(data, sampler="grid", methods={"loreft": {"overrides": [], "space": space}})
    study = make_study(tmp_path, values)
    work(study)
    states = {t.params["intervention.rank"]: t.state.name for t in study.trials("loreft")}
    assert states == {2: "COMPLETE", 999: "FAIL"}
    (error,) = summarize(study)["methods"]["loreft"]["failed"].values()
    assert "SetupError" in error
    assert "rank must lie in 1..32" in error


def test_the_batch_that_uses_up_the_budget_ends_a_trial(data, tmp_path):
    study = make_study(tmp_path, contents(data, budget={"unit": "steps", "amount": 20}))
    work(study)  # a trial takes 12 steps
    first, second = study.trials("loreft")
    assert (first.state.name, second.state.name) == ("COMPLETE", "PRUNED")
    assert spent(study.trials("loreft"))["steps"] == 20
    results = results_of(study, 1)
    assert (results["status"], results["steps"]) == ("pruned", 8)
    assert results["reason"] == "the method's budget of 20 steps is used up"
    assert study.best("loreft").number == 0


def test_a_trial_that_ends_with_the_budget_is_complete(data, tmp_path):
    study = make_study(tmp_path, contents(data, budget={"unit": "steps", "amount": 12}))
    work(study)
    assert [t.state.name for t in study.trials("loreft")] == ["COMPLETE"]
    assert spent(study.trials("loreft"))["steps"] == 12


def test_a_trial_that_falls_behind_ends_there(data, tmp_path):
    # two validations per trial; one of three trials continues to the second
    values = contents(
        data, sampler="grid", pruner="successive_halving", budget={"unit": "trials", "amount": 3}, sampler_seed=1
    )  # fmt: skip
    study = make_study(tmp_path, values)
    work(study)
    firsts = []
    for trial in study.trials("loreft"):
        firsts.append(trial.intermediate_values[1])
        goes_on = sorted(firsts).index(firsts[-1]) < max(1, len(firsts) // 3)
        assert (trial.state.name == "COMPLETE") == goes_on or len(trial.intermediate_values) == 2
        if not goes_on:
            assert (trial.state.name, len(trial.intermediate_values)) == ("PRUNED", 1)
            assert results_of(study, trial.number)["status"] == "pruned"
            assert trial.user_attrs["cost"]["steps"] == 6
            assert_untested(study, trial.number)
    assert "PRUNED" in {t.state.name for t in study.trials("loreft")}


# --- by the command


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_command_that_is_killed_goes_on(data, tmp_path):
    values = contents(
        data, sampler="tpe", startup_trials=1, pruner="successive_halving", seeds=[1],
        budget={"unit": "steps", "amount": 30},
    )  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    begin = ["search=mine.yaml", "folder=killed"]
    # in the middle of a trial, and of the winner's run
    for moment in ("trials/loreft/1/results.json", "winners/loreft/seed_1/results.json"):
        running = start(begin, tmp_path)
        while not (tmp_path / "killed" / moment).is_file():
            assert running.poll() is None, running.communicate()[0]
            time.sleep(0.02)
        running.send_signal(signal.SIGKILL)
        running.communicate()
        begin = ["folder=killed"]
    last = start(begin, tmp_path)
    printed, _ = last.communicate()
    assert last.returncode == 0, printed
    trials = Study(tmp_path / "killed").trials("loreft")
    assert len(counted(trials)) == len(trials) - 1  # the first attempt of one costs nothing
    assert spent(trials)["steps"] == 30
    summary = json.loads((tmp_path / "killed" / "summary.json").read_text())
    assert summary["status"] == "complete"
    assert {(r["method"], r["seed"]) for r in summary["test_reads"]} == {("loreft", 1)}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_workers_and_a_trial_whose_process_is_killed(data, tmp_path):
    values = contents(data, budget={"unit": "trials", "amount": 3})
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    running = start(["search=mine.yaml", "folder=study", "workers=2"], tmp_path)
    # what the kernel does when memory runs out
    victim = tmp_path / "study" / "trials" / "loreft" / "1"
    found = []
    while not found:  # its log exists a moment before its command line does
        assert running.poll() is None, running.communicate()[0]
        time.sleep(0.05)
        processes = [p for p in Path("/proc").iterdir() if p.name.isdigit()]
        found = [
            int(p.name) for p in processes if {"reft_lightning.search.trial", str(victim)} <= {*_words(p)}
        ]
    os.kill(found[0], signal.SIGKILL)
    printed, _ = running.communicate()
    assert running.returncode == 0, printed
    summary = json.loads((tmp_path / "study" / "summary.json").read_text())
    assert summary["methods"]["loreft"]["trials"] == {"complete": 2, "pruned": 0, "failed": 1, "running": 0}
    assert summary["methods"]["loreft"]["failed"]["1"].startswith("killed by SIGKILL (out of memory?)")
    assert summary["budget"]["verdict"] == "equal"


def _words(process):
    try:
        return (process / "cmdline").read_bytes().decode().split("\0")
    except OSError:  # it has ended
        return []
