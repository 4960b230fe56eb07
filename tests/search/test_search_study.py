"""The trials of a study: kills, failures, workers, budgets, with fake runs that only write a run's files."""

import threading
import time

import pytest
from pretended_runs import (
    STEPS,
    Killed,
    make_plan,
    make_study,
    pretend,
    spend,
    trials_of,
    work,
    work_with_others,
    write_results,
)

from reft_lightning.search.budget import counted, verdict
from reft_lightning.search.command import begin_study
from reft_lightning.search.study import Study
from reft_lightning.search.study_files import PLAN, read_job
from reft_lightning.search.summary import summarize
from reft_lightning.search.worker import Worker


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study that nothing interrupted."""
    study = make_study(tmp_path_factory.mktemp("whole"))
    work(study)
    return study


# --- trials


def test_every_method_spends_the_same_trials(whole):
    assert [len(trials) for trials in trials_of(whole).values()] == [8, 8]
    summary = summarize(whole)
    assert summary["budget"]["verdict"] == "equal"
    assert summary["status"] == "complete"
    assert summary["methods"]["loreft"]["trials"] == {"complete": 5, "pruned": 2, "failed": 1, "running": 0}
    assert summary["methods"]["loreft"]["spent"]["steps"] == 8 * STEPS


def test_a_trial_that_fails_is_recorded_and_the_study_goes_on(whole):
    failed = summarize(whole)["methods"]["direft"]["failed"]
    assert failed == {"3": "exit status 1\nthe last line of its log"}
    assert [t.number for t in whole.trials("direft") if t.state.name == "COMPLETE"] == [0, 1, 4, 5, 7]


@pytest.mark.parametrize("scores", [{"val_accuracy": float("nan")}, {}])
def test_a_score_that_is_missing_or_not_a_number_fails_the_trial(tmp_path, scores):
    def diverge(folder):
        write_results(folder, "complete", **scores)
        return ""

    study = make_study(tmp_path, budget={"unit": "trials", "amount": 1}, seeds=[])
    work(study, diverge)
    (error,) = summarize(study)["methods"]["loreft"]["failed"].values()
    found = "not a number" if scores else "missing"
    assert error == f"the run ended with status 'complete', and val/accuracy is {found}"


def test_one_worker_draws_the_same_trials_again_for_the_same_seed(whole, tmp_path):
    again, other = make_study(tmp_path / "again"), make_study(tmp_path / "other", sampler_seed=1)
    work(again)
    work(other)
    assert trials_of(again) == trials_of(whole)
    assert trials_of(other) != trials_of(whole)


def test_no_two_trials_draw_the_same(whole, tmp_path):
    drawn_at_random = make_study(tmp_path, sampler="random", seeds=[])
    work(drawn_at_random)
    for study in (whole, drawn_at_random):
        drawn = [str(trial.params) for method in study.plan.methods for trial in study.trials(method)]
        assert len(set(drawn)) == len(drawn)


def test_a_grid_has_every_combination_once_also_after_a_kill(tmp_path):
    space = {"intervention.rank": {"choice": [1, 2, 4]}, "optimizer.lr": {"log": [1e-4, 1e-2], "points": 3}}
    plan = {
        "methods": {"loreft": {"overrides": [], "space": space}}, "sampler": "grid", "seeds": [],
        "budget": {"unit": "tokens", "amount": 1e9},
    }  # fmt: skip
    study = make_study(tmp_path, **plan)

    def killed_at_the_third(folder):
        if read_job(folder)["number"] == 2:
            raise Killed
        return pretend(study, folder)

    with pytest.raises(Killed):
        work(study, killed_at_the_third)
    study = Study(tmp_path)
    work(study)
    drawn = [tuple(sorted(trial.params.items())) for trial in counted(study.trials("loreft"))]
    assert len(drawn) == len(set(drawn)) == 9


def test_a_trials_folder_has_the_command_that_repeats_it(whole):
    trial = whole.trials("loreft")[4]
    words = (whole.folder / trial.user_attrs["folder"] / "command.txt").read_text().split()
    assert "reft-train" in words
    assert f"optimizer.lr={trial.params['optimizer.lr']}" in words
    assert words[-1] == "sealed=true"


# --- kills and workers


def database(tmp_path):
    return f"sqlite:///{tmp_path}/trials.db"


@pytest.mark.parametrize("ending", [Killed, KeyboardInterrupt])
def test_a_trial_that_was_cut_off_runs_again_and_costs_nothing(tmp_path, ending):
    study = make_study(tmp_path, budget={"unit": "steps", "amount": 3 * STEPS}, seeds=[1])

    def cut(folder):
        job = read_job(folder)
        if (job["method"], job["number"]) == ("direft", 1):
            spend(study, job, steps=STEPS - 1).report(0.1, 1)
            raise ending
        return pretend(study, folder)

    with pytest.raises(ending):
        work(study, cut)
    study = Study(tmp_path)
    work(study)
    summary = summarize(study)
    assert summary["status"] == "complete"
    assert {name: method["spent"]["steps"] for name, method in summary["methods"].items()} == {
        "loreft": 3 * STEPS, "direft": 3 * STEPS
    }  # fmt: skip
    assert sum(summary["methods"]["direft"]["trials"].values()) == 3
    lost, *_ = (t for t in study.trials("direft") if t not in counted(study.trials("direft")))
    again = next(t for t in counted(study.trials("direft")) if t.params == lost.params)
    assert list(again.intermediate_values) == [1]
    assert again.intermediate_values[1] != 0.1  # from its beginning


def test_trials_may_lie_in_a_database_that_other_searches_share(tmp_path):
    few = {"budget": {"unit": "trials", "amount": 1}, "seeds": []}
    one = make_study(tmp_path / "one", database(tmp_path), **few)
    other = make_study(tmp_path / "other", database(tmp_path), **few)
    work(one)
    assert [len(trials) for trials in trials_of(other).values()] == [0, 0]
    work(other)
    assert trials_of(other) == trials_of(one)
    assert not list(tmp_path.glob("*/*.journal"))


def test_a_trial_of_a_database_whose_heartbeat_stopped_runs_again(tmp_path, monkeypatch):
    monkeypatch.setattr("reft_lightning.search.study.HEARTBEAT", 1)
    study = make_study(tmp_path, database(tmp_path), budget={"unit": "trials", "amount": 2}, seeds=[])

    def die(folder):
        raise Killed

    with pytest.raises(Killed):
        work(study, die)
    study = Study(tmp_path)
    work(study)
    assert summarize(study)["methods"]["loreft"]["trials"]["running"] == 0
    assert [len(counted(study.trials(method))) for method in study.plan.methods] == [2, 2]
    assert [len(study.trials(method)) for method in study.plan.methods] == [3, 2]


def test_a_trial_that_ends_while_another_worker_looks_for_lost_ones_is_not_lost(tmp_path, monkeypatch):
    study = make_study(tmp_path)
    study.start()
    trial, worker = study.studies["loreft"].ask(), Worker(study)
    lock = worker._lock

    def ends_first(method, number):
        study.studies["loreft"].tell(trial, 0.5)
        return lock(method, number)

    monkeypatch.setattr(worker, "_lock", ends_first)
    worker._retry_lost("loreft")
    assert [(t.state.name, t.value) for t in study.trials("loreft")] == [("COMPLETE", 0.5)]


def test_workers_share_a_study_without_doing_anything_twice(tmp_path):
    make_study(tmp_path).start()
    ran = []

    def worker():
        study = Study(tmp_path)

        def slow(folder):
            ran.append(str(folder))
            time.sleep(0.05)
            return pretend(study, folder)

        work_with_others(study, slow)

    workers = [threading.Thread(target=worker) for _ in range(3)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    assert len(ran) == len(set(ran)) == 2 * 8 + 2 * 2
    study = Study(tmp_path)
    summary = summarize(study)
    assert (summary["status"], summary["budget"]["verdict"]) == ("complete", "equal")
    drawn = [str(trial.params) for method in study.plan.methods for trial in study.trials(method)]
    assert len(set(drawn)) == len(drawn)


# --- budgets


def test_trials_start_while_anything_is_left(tmp_path):
    study = make_study(tmp_path, budget={"unit": "tokens", "amount": 250}, seeds=[])
    work(study)
    spent = {name: method["spent"]["tokens"] for name, method in summarize(study)["methods"].items()}
    assert spent == {"loreft": 300, "direft": 300}


def test_a_method_whose_trials_cost_nothing_ends_until_the_next_start(tmp_path):
    study = make_study(tmp_path, budget={"unit": "tokens", "amount": 250}, seeds=[])

    def broken(folder):
        fails = read_job(folder)["method"] == "loreft"
        return "exit status 2\nno such file" if fails else pretend(study, folder)

    work(study, broken)
    summary = summarize(study)
    assert summary["methods"]["loreft"]["gave_up"] == "3 trials in a row cost no tokens"
    assert summary["methods"]["loreft"]["trials"]["failed"] == 3
    assert summary["methods"]["direft"]["gave_up"] == ""
    assert summary["budget"]["verdict"].startswith("unequal: loreft has spent 0 tokens")
    again = Study(tmp_path)
    work(again)
    summary = summarize(again)
    assert (summary["methods"]["loreft"]["gave_up"], summary["budget"]["verdict"]) == ("", "equal")


def test_a_method_that_spent_less_is_reported():
    costs = {"loreft": {"tokens": 120}, "direft": {"tokens": 200}}
    assert verdict("tokens", 200, costs) == "unequal: loreft has spent 120 tokens, direft 200, of 200"
    costs = {"a": {"tokens": 1e6}, "b": {"tokens": 1.005e6}}
    assert verdict("tokens", 1e6, costs) == "equal"
    costs = {name: {"trials": n, "steps": 1, "tokens": 1} for name, n in (("a", 399), ("b", 400))}
    assert verdict("trials", 400, costs) == "unequal: a has spent 399 trials, b 400, of 400"


def test_trials_of_other_lengths_are_reported_where_trials_are_counted():
    costs = {
        "loreft": {"trials": 2, "steps": 20, "tokens": 200}, "direft": {"trials": 2, "steps": 16, "tokens": 200}
    }  # fmt: skip
    assert verdict("trials", 2, costs) == (
        "equal; trials were not equally long: direft 16 steps and loreft 20, 1.25 times as many"
    )
    assert verdict("steps", 400, costs) == "equal"
    costs = {"a": {"trials": 2, "steps": 1000, "tokens": 0}, "b": {"trials": 2, "steps": 1009, "tokens": 7}}
    assert verdict("trials", 2, costs) == "equal; trials were not equally long: a 0 tokens and b 7"


def test_two_commands_do_not_begin_a_study_in_one_folder(tmp_path):
    begin_study(tmp_path, make_plan(), "val/accuracy", "max")
    plan = (tmp_path / PLAN).read_text()
    with pytest.raises(ValueError, match="another command has started a study there"):
        begin_study(tmp_path, make_plan(seeds=[3]), "val/accuracy", "max")
    assert (tmp_path / PLAN).read_text() == plan
