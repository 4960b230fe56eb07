"""What follows the trials of a study: winners and reads of test splits; and what its folder keeps."""

import dataclasses
import json

import pytest
import yaml
from pretended_runs import Killed, make_plan, make_study, pretend, work, work_with_others, write_results

from reft_lightning.reporting.studies import read_study as read_report
from reft_lightning.search import command
from reft_lightning.search.study import Study, read_study
from reft_lightning.search.study_files import JOURNAL, LEDGER, read_job
from reft_lightning.search.summary import print_summary, summarize
from reft_lightning.storage.atomic import write_json


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study that nothing interrupted."""
    study = make_study(tmp_path_factory.mktemp("whole"))
    work(study)
    return study


# --- winners


def test_the_winner_is_the_best_complete_trial_the_first_of_equals(whole, tmp_path):
    complete = [t for t in whole.trials("loreft") if t.state.name == "COMPLETE"]
    assert whole.best("loreft").value == max(t.value for t in complete)

    def equal(folder):
        write_results(folder, "complete", val_accuracy=0.5)
        return ""

    study = make_study(tmp_path, seeds=[])
    work(study, equal)
    assert study.best("loreft").number == 0


def test_of_trials_with_equal_scores_the_one_with_the_lowest_loss_wins(tmp_path):
    def equal(folder):
        write_results(folder, "complete", val_accuracy=0.0, val_loss=abs(read_job(folder)["number"] - 2))
        return ""

    study = make_study(tmp_path, seeds=[], budget={"unit": "trials", "amount": 4})
    work(study, equal)
    assert study.best("loreft").number == 2
    assert read_report(tmp_path).best("loreft").number == 2


def test_winners_are_tested_once_with_every_seed(whole):
    work(Study(whole.folder))  # a second start changes nothing
    summary = summarize(whole)
    reads = summary["test_reads"]
    assert sorted((r["method"], r["seed"]) for r in reads) == [
        ("direft", 1), ("direft", 2), ("loreft", 1), ("loreft", 2)
    ]  # fmt: skip
    assert not any(r.get("again") for r in reads)
    winner = summary["methods"]["loreft"]["winners"]["2"]
    assert (winner["status"], winner["metrics"]["test/accuracy"]) == ("complete", 0.5)


def test_the_folder_of_a_winner_says_which_trial_won(whole):
    summary = summarize(whole)["methods"]["loreft"]
    job = read_job(whole.folder / summary["winners"]["1"]["folder"])
    assert (job["kind"], job["method"], job["seed"]) == ("winner", "loreft", 1)
    assert (job["number"], job["params"]) == (summary["best"]["number"], summary["best"]["params"])


def ranks_of_winners(study):
    jobs = [read_job(path.parent) for path in study.folder.glob("winners/*/*/results.json")]
    return {job["params"]["intervention.rank"] for job in jobs}


def more_rank_is_better(sign):
    def run(folder):
        params = read_job(folder)["params"]
        write_results(folder, "complete", val_accuracy=sign * params["intervention.rank"] / 10)
        return ""

    return run


RANKS = {"loreft": {"overrides": [], "space": {"intervention.rank": {"choice": [1, 2, 4]}}}}
GRID = {"methods": RANKS, "sampler": "grid", "seeds": [1]}


def test_raising_the_budget_leaves_no_winner_of_an_earlier_best_trial(tmp_path):
    def later_is_better(folder):
        write_results(folder, "complete", val_accuracy=read_job(folder)["number"] / 10)
        return ""

    study = make_study(tmp_path, **(GRID | {"budget": {"unit": "trials", "amount": 1}}))
    work(study, later_is_better)
    assert ranks_of_winners(study) == {study.trials("loreft")[0].params["intervention.rank"]}
    command.go_on(tmp_path, None, ["budget.amount=3"])
    study = Study(tmp_path)
    work(study, later_is_better)
    assert ranks_of_winners(study) == {study.trials("loreft")[2].params["intervention.rank"]}


def test_a_winner_of_a_lost_storage_is_not_that_of_its_successor(tmp_path):
    study = make_study(tmp_path, budget={"unit": "trials", "amount": 3}, **GRID)
    work(study, more_rank_is_better(1))
    assert ranks_of_winners(study) == {4}
    (tmp_path / JOURNAL).unlink()
    study = Study(tmp_path)
    status = summarize(study)
    assert status["status"] == "running"
    work(study, more_rank_is_better(-1))
    assert ranks_of_winners(study) == {1}
    assert summarize(study)["status"] == "complete"


def test_winners_wait_for_the_last_trial(tmp_path):
    study = make_study(tmp_path, budget={"unit": "trials", "amount": 2}, seeds=[1])

    def killed_at_the_last(folder):
        if (read_job(folder)["method"], read_job(folder)["number"]) == ("direft", 1):
            raise Killed
        return pretend(study, folder)

    with pytest.raises(Killed):
        work(study, killed_at_the_last)
    assert not (tmp_path / "winners").exists()
    work(Study(tmp_path))
    assert len(list(tmp_path.glob("winners/*/seed_1/results.json"))) == 2


def test_a_second_read_of_a_test_split_is_shown(tmp_path, capsys):
    study = make_study(tmp_path, budget={"unit": "trials", "amount": 1}, seeds=[1])
    work(study)
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


def test_a_winner_that_fails_is_reported_and_run_again_at_the_next_start_only(tmp_path):
    study = make_study(tmp_path, budget={"unit": "trials", "amount": 1}, seeds=[1])
    ran = []

    def lose_winners(folder):
        job = read_job(folder)
        ran.append(job["kind"])
        return "exit status 1\nlost" if job["kind"] == "winner" else pretend(study, folder)

    work(study, lose_winners)
    work_with_others(Study(tmp_path), lose_winners)  # another worker of the same command
    summary = summarize(study)
    assert summary["status"] == "running"
    winner = summary["methods"]["loreft"]["winners"]["1"]
    assert (winner["status"], winner["error"]) == ("failed", "exit status 1\nlost\n")
    assert ran == ["trial", "trial", "winner", "winner"]
    again = Study(tmp_path)
    work(again)
    assert summarize(again)["status"] == "complete"


def test_a_winners_run_that_ended_otherwise_has_failed(tmp_path):
    study = make_study(tmp_path, budget={"unit": "trials", "amount": 1}, seeds=[1])

    def halt(folder):
        if read_job(folder)["kind"] == "trial":
            return pretend(study, folder)
        write_results(folder, "stopped")
        return ""

    work(study, halt)
    winner = summarize(study)["methods"]["loreft"]["winners"]["1"]
    assert (winner["status"], winner["error"]) == ("failed", "the run ended with status 'stopped'\n")


def test_a_winner_that_was_stopped_after_its_test_goes_on(tmp_path):
    study = make_study(tmp_path, budget={"unit": "trials", "amount": 1}, seeds=[1])

    def stop_after_the_test(folder):
        if read_job(folder)["kind"] == "winner":
            write_results(folder, "stopped", test_accuracy=0.5)
            (folder / "checkpoints").mkdir()
            (folder / "checkpoints" / "last.ckpt").touch()
            return "exit status 1"
        return pretend(study, folder)

    work(study, stop_after_the_test)
    kept = []

    def go_on(folder):
        kept.append((folder / "checkpoints" / "last.ckpt").is_file())
        write_results(folder, "complete", test_accuracy=0.5)
        return ""

    work(Study(tmp_path), go_on)
    assert kept == [True, True]
    assert summarize(study)["status"] == "complete"


def test_a_winner_at_the_edge_of_its_space_is_marked(tmp_path, capsys):
    study = make_study(tmp_path, **(GRID | {"budget": {"unit": "trials", "amount": 3}}))
    work(study, more_rank_is_better(1))
    summary = summarize(study)
    edges = ["at the upper edge of intervention.rank"]
    assert summary["methods"]["loreft"]["best"]["edges"] == edges
    assert read_job(tmp_path / "winners/loreft/seed_1")["edges"] == edges
    print_summary(summary, tmp_path)
    printed = capsys.readouterr().out
    assert "loreft: the winner is at the upper edge of intervention.rank; values beyond" in printed


# --- the folder


@pytest.fixture
def begun(tmp_path):
    return make_study(tmp_path / "study").folder


def test_a_study_goes_on_with_its_plan(begun):
    found, more = read_study(begun)
    assert found == make_plan()
    assert more["monitor"] == "val/accuracy"
    assert command.prepare_study({"folder": str(begun)}, []) == begun
    with pytest.raises(ValueError, match=r"is missing, or folder=FOLDER of an existing study"):
        command.prepare_study({}, [])
    with pytest.raises(ValueError, match=rf"folder={begun}s: no such folder; did you mean '{begun}'\?"):
        command.prepare_study({"folder": f"{begun}s"}, [])
    with pytest.raises(ValueError, match=r"is not a study: it has no study\.yaml"):
        command.prepare_study({"folder": str(begun.parent)}, [])


def test_only_the_budget_of_a_study_can_be_raised_and_not_after_the_test(begun):
    command.go_on(begun, None, ["budget.amount=12"])
    assert read_study(begun)[0].budget.amount == 12
    command.go_on(begun, None, ["budget.amount=1.6e1"])  # a number to OmegaConf, and text to YAML
    assert read_study(begun)[0].budget.amount == 16
    with pytest.raises(ValueError, match="can only be raised"):
        command.go_on(begun, None, ["budget.amount=4"])
    with pytest.raises(ValueError, match=r"differs in sampler; only budget\.amount can be raised"):
        command.go_on(begun, None, ["sampler=random"])
    with pytest.raises(ValueError, match="its runs cannot change"):
        command.go_on(begun, None, ["seed=7"])
    (begun / LEDGER).write_text('{"method": "loreft", "seed": 1, "model": "adapted"}\n')
    with pytest.raises(ValueError, match="more trials would be selected with knowledge of them"):
        command.go_on(begun, None, ["budget.amount=20"])


def test_a_test_that_the_ledger_has_lost_is_known_from_its_winner(tmp_path):
    study = make_study(tmp_path, budget={"unit": "trials", "amount": 1}, seeds=[1])
    work(study)
    for results in tmp_path.glob("winners/*/*/results.json"):
        reads = [
            {"task": task, "rows": 6, "time": "2026-01-01", "model": "adapted"} for task in ("boolq", "piqa")
        ]
        write_json(results, json.loads(results.read_text()) | {"finished": "2026-01-02", "test_reads": reads})
    before = summarize(study)["test_reads"]
    (tmp_path / LEDGER).unlink()
    after = summarize(study)["test_reads"]
    assert before == after
    assert [(r["method"], r["seed"]) for r in after] == [("direft", 1), ("loreft", 1)]
    with pytest.raises(ValueError, match="more trials would be selected with knowledge of them"):
        command.go_on(tmp_path, None, ["budget.amount=20"])


def test_a_folder_keeps_one_plan(begun, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(dataclasses.asdict(make_plan(sampler="random")), sort_keys=False))
    with pytest.raises(ValueError, match="a study whose plan differs in sampler;"):
        command.prepare_study({"search": str(other), "folder": str(begun)}, [])
