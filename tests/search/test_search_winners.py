"""What comes after the trials of a study: winners, reads of test splits; and what its folder keeps."""

import json

import pytest
import yaml
from pretended_runs import make_plan, make_study, pretend

from reft_lightning.search import command
from reft_lightning.search.study import LEDGER
from reft_lightning.search.summary import print_summary, summarize
from reft_lightning.storage.atomic import write_json


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study that nothing interrupted."""
    study = make_study(tmp_path_factory.mktemp("whole"))
    command.work(study, pretend)
    return study


# --- winners


def test_the_winner_is_the_best_complete_trial_the_first_of_equals(whole):
    best = whole.winner("loreft")
    complete = whole.trials("loreft", "COMPLETE")
    assert best.value == max(t.value for t in complete)
    assert best.number == min(t.number for t in complete if t.value == best.value)


def test_winners_are_tested_once_with_every_seed(whole):
    command.work(whole, pretend)  # a second start changes nothing
    summary = summarize(whole)
    reads = summary["test_reads"]
    assert sorted((r["method"], r["seed"]) for r in reads) == [
        ("direft", 1), ("direft", 2), ("loreft", 1), ("loreft", 2)
    ]  # fmt: skip
    assert not any(r.get("again") for r in reads)
    winner = summary["methods"]["loreft"]["winners"]["2"]
    assert (winner["status"], winner["metrics"]["test/accuracy"]) == ("complete", 0.5)


def test_a_second_read_of_a_test_split_is_shown(tmp_path, capsys):
    study = make_study(tmp_path, budget={"unit": "trials", "amount": 1}, seeds=[1])
    command.work(study, pretend)
    results = tmp_path / "winners" / "loreft" / "seed_1" / "results.json"
    values = json.loads(results.read_text()) | {"finished": "2026-01-02"}
    values["test_reads"] = [
        {"task": "boolq", "rows": 6, "time": day, "model": "adapted", "config_hash": "h"}
        for day in ("2026-01-01", "2026-01-03")
    ]
    write_json(results, values)
    summary = summarize(study)
    assert [(r["method"], r["time"]) for r in summary["test_reads"] if r.get("again")] == [
        ("loreft", "2026-01-03")
    ]
    print_summary(summary, tmp_path)
    assert "reads of a test split: 3, 1 of them after the first" in capsys.readouterr().out


def test_a_winner_that_fails_is_said_and_run_again_at_the_next_start(tmp_path):
    plan_of = {"budget": {"unit": "trials", "amount": 1}, "seeds": [1]}
    study = make_study(tmp_path, **plan_of)
    command.work(study, lambda job: pretend(job) if job.seed is None else "exit status 1\nlost")
    summary = summarize(study)
    assert summary["status"] == "running"
    assert summary["methods"]["loreft"]["winners"]["1"]["status"] == "failed"
    again = make_study(tmp_path, **plan_of)
    command.work(again, pretend)
    assert summarize(again)["status"] == "complete"


def test_a_winner_that_fails_is_not_run_again_by_another_worker(tmp_path):
    plan_of = {"budget": {"unit": "trials", "amount": 1}, "seeds": [1]}
    ran = []

    def fail(job):
        ran.append(job.name)
        assert len(ran) < 20, "it would never end"
        return pretend(job) if job.seed is None else "exit status 1\nlost"

    one = make_study(tmp_path, **plan_of)
    command.work(one, fail)
    command.work(make_study(tmp_path, since=one.since, **plan_of), fail)  # of the same command
    assert ran == ["loreft 0", "direft 0", "loreft 0, seed 1", "direft 0, seed 1"]
    command.work(make_study(tmp_path, **plan_of), fail)  # of the next
    assert len(ran) == 6


def test_a_winners_run_that_ended_otherwise_has_failed(tmp_path):
    def halt(job):
        ended = pretend(job)
        if job.seed is not None:
            write_json(job.folder / "results.json", {"status": "stopped", "metrics": {}, "test_reads": []})
        return ended

    study = make_study(tmp_path, budget={"unit": "trials", "amount": 1}, seeds=[1])
    command.work(study, halt)
    winner = summarize(study)["methods"]["loreft"]["winners"]["1"]
    assert (winner["status"], winner["error"]) == ("failed", "the run ended as 'stopped'\n")


def test_a_winner_at_the_edge_of_its_space_is_marked(tmp_path, capsys):
    def more_is_better(job):
        scores = {"val/accuracy": job.params["intervention.rank"] / 10}
        write_json(job.folder / "results.json", {"status": "complete", "metrics": scores})
        return ""

    space = {"intervention.rank": {"choice": [1, 2, 4]}}
    methods = {"loreft": {"overrides": [], "space": space}}
    study = make_study(
        tmp_path, methods=methods, sampler="grid", budget={"unit": "trials", "amount": 3}, seeds=[]
    )
    command.work(study, more_is_better)
    summary = summarize(study)
    assert summary["methods"]["loreft"]["best"]["edges"] == ["at the upper edge of intervention.rank"]
    print_summary(summary, tmp_path)
    said = capsys.readouterr().out
    assert "loreft: the winner lies at the upper edge of intervention.rank; beyond, nothing was tried" in said


# --- the folder


@pytest.fixture
def begun(tmp_path):
    folder = tmp_path / "study"
    folder.mkdir()
    command.write_plan(folder, make_plan(), "val/accuracy", "max", str(tmp_path))
    return folder


def test_a_study_goes_on_with_its_plan(begun):
    found, more = command.read_study_plan(begun)
    assert found == make_plan()
    assert more["monitor"] == "val/accuracy"
    assert command.prepare({"folder": str(begun)}, []) == begun
    with pytest.raises(ValueError, match=r"is missing, or folder=FOLDER of a study"):
        command.prepare({}, [])
    with pytest.raises(ValueError, match=rf"folder={begun}s: no such folder; did you mean '{begun}'\?"):
        command.prepare({"folder": f"{begun}s"}, [])
    with pytest.raises(ValueError, match=r"holds no study: it has no study\.yaml"):
        command.prepare({"folder": str(begun.parent)}, [])


def test_only_the_budget_of_a_study_can_be_raised_and_not_after_the_test(begun):
    command.go_on(begun, ["budget.amount=12"])
    assert command.read_study_plan(begun)[0].amount == 12
    command.go_on(begun, ["budget.amount=1.6e1"])  # a number to OmegaConf, and text to YAML
    assert command.read_study_plan(begun)[0].amount == 16
    with pytest.raises(ValueError, match="can only be raised"):
        command.go_on(begun, ["budget.amount=4"])
    with pytest.raises(ValueError, match=r"only budget\.amount can be raised"):
        command.go_on(begun, ["sampler=random"])
    (begun / LEDGER).write_text("{}\n")
    with pytest.raises(ValueError, match="more trials would select knowing them"):
        command.go_on(begun, ["budget.amount=20"])


def test_a_folder_keeps_one_plan(begun, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(make_plan(sampler="random").to_dict(), sort_keys=False))
    with pytest.raises(ValueError, match="another plan: sampler differ"):
        command.prepare({"search": str(other), "folder": str(begun)}, [])
