"""Studies: budgets, kills, failures, pruning, winners; most with runs that only write what a run writes."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from reft_lightning import search
from reft_lightning.results import write_json
from reft_lightning.search import budget, plan, process
from reft_lightning.search.pruning import Reports, falls_behind
from reft_lightning.search.study import LEDGER, Study
from reft_lightning.search.summary import print_summary, summarize

STEPS = 10  # of a trial of the runs below


def make_plan(**changes):
    methods = {
        name: {
            "overrides": [f"intervention={name}"],
            "space": {"optimizer.lr": {"log": [1e-4, 1e-1]}, "intervention.rank": {"choice": [1, 2, 4]}},
        }
        for name in ("loreft", "direft")
    }
    values = {
        "base": ["model=tiny_random", "data=boolq"], "methods": methods, "startup_trials": 3, "seeds": [1, 2],
        "budget": {"unit": "trials", "amount": 8},
    }  # fmt: skip
    return plan.parse_plan("test", values | changes)


def make_study(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    return Study(folder, make_plan(**changes), "val/accuracy", True)


def pretend(job):
    """Write what a run writes: a score by the parameters; some fail, and some are pruned."""
    results = {
        "status": "running",
        "metrics": {},
        "counts": {},
        "test_reads": [],
        "config_hash": f"hash {job.name}",
    }
    if job.seed is not None:
        line = {"time": "2026-01-01", "method": job.method, "seed": job.seed, "config_hash": "h", "model": "adapted",
                "folder": str(job.folder)}  # fmt: skip
        with (job.folder.parents[2] / LEDGER).open("a") as file:
            file.write(json.dumps(line) + "\n")
        metrics = {"val/accuracy": 0.5, "test/accuracy": 0.25 * job.seed}
        write_json(job.folder / "results.json", results | {"status": "complete", "metrics": metrics})
        return ""
    score = 1 - abs(job.params["optimizer.lr"] - 0.01) * 10 + job.params["intervention.rank"] / 100
    write_json(job.folder / "results.json", results)
    reports = Reports(job.folder)
    reports.add(score / 2)
    reports.write()
    write_json(job.folder / "cost.json", {"steps": STEPS, "tokens": 100, "seconds": 1.5, "flops": 1e6})
    if job.number % 5 == 3:
        return "exit status 1\nthe last line of its log"
    status = "pruned" if job.number % 4 == 2 else "complete"
    write_json(job.folder / "results.json", results | {"status": status, "metrics": {"val/accuracy": score}})
    return ""


def trials_of(study):
    """Everything of a study's trials that their times do not decide."""
    return {
        method: [
            (t.number, t.params, t.state.name, t.values, t.intermediate_values, t.user_attrs.get("error"))
            for t in study.trials(method)
        ]
        for method in study.plan.methods
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study that nothing interrupted."""
    study = make_study(tmp_path_factory.mktemp("whole"))
    search.work(study, pretend)
    return study


# --- trials


def test_every_method_spends_the_same_trials(whole):
    found = trials_of(whole)
    assert [len(trials) for trials in found.values()] == [8, 8]
    summary = summarize(whole, write=False)
    assert summary["budget"]["verdict"] == "equal"
    assert summary["status"] == "complete"
    assert summary["methods"]["loreft"]["trials"] == {"complete": 5, "pruned": 2, "failed": 1, "running": 0}
    assert summary["methods"]["loreft"]["spent"]["steps"] == 8 * STEPS


def test_a_trial_that_fails_is_recorded_and_the_study_goes_on(whole):
    failed = summarize(whole, write=False)["methods"]["direft"]["failed"]
    assert failed == {"3": "exit status 1\nthe last line of its log"}
    assert [t.number for t in whole.trials("direft", "COMPLETE")] == [0, 1, 4, 5, 7]


def test_a_score_that_is_no_number_fails_the_trial(tmp_path):
    def diverge(job):
        write_json(
            job.folder / "results.json", {"status": "complete", "metrics": {"val/accuracy": float("nan")}}
        )
        return ""

    study = make_study(tmp_path, budget={"unit": "trials", "amount": 1}, seeds=[])
    search.work(study, diverge)
    (error,) = summarize(study)["methods"]["loreft"]["failed"].values()
    assert error == "the run ended as 'complete', and val/accuracy is nan"


def test_each_trial_is_drawn_again_by_its_number_alone(whole):
    from reft_lightning.search.space import draw

    for method, own in whole.plan.methods.items():
        trials = whole.trials(method)
        for t in trials:
            again = draw(own.space, "tpe", 0, method, t.number, trials[: t.number], True, 3)
            assert again == t.params


def test_a_trials_folder_has_the_command_that_repeats_it(whole):
    words = (whole.folder / "trials" / "loreft" / "4" / "command.txt").read_text().split()
    params = whole.trials("loreft")[4].params
    assert words[0] == "reft-train"
    assert f"optimizer.lr={params['optimizer.lr']}" in words
    assert words[-1] == "sealed=true"


def test_a_study_that_is_killed_at_random_points_has_the_trials_of_one_that_is_not(whole, tmp_path):
    rng = random.Random(0)
    kills = 0
    for attempt in range(200):
        child = os.fork()
        if child == 0:  # dies wherever it is when the timer ends: SIGALRM is not handled
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.02, 0.3) * (1 + attempt / 10))
            search.work(make_study(tmp_path), pretend)
            os._exit(0)
        rng.random()
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        kills += 1
    assert kills >= 3
    study = make_study(tmp_path)
    assert trials_of(study) == trials_of(whole)
    assert summarize(study)["status"] == "complete"


def test_a_trial_that_had_ended_when_its_outcome_was_lost_is_not_run_again(tmp_path):
    study = make_study(tmp_path, budget={"unit": "trials", "amount": 1}, seeds=[])
    job = study.take_trial()
    study.prepare(job)
    pretend(job)
    job.lock.release()  # as the end of the process does

    def fail(job):
        raise AssertionError(f"{job.name} ran again") if job.method == "loreft" else KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search.work(make_study(tmp_path, budget={"unit": "trials", "amount": 1}, seeds=[]), fail)
    assert trials_of(study)["loreft"][0][2] == "COMPLETE"


def test_workers_share_a_study_without_doing_anything_twice(tmp_path):
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:

            def slow(job):
                with (tmp_path / "ran.txt").open("a") as file:
                    file.write(f"{job.name}\n")
                time.sleep(0.05)
                return pretend(job)

            search.work(make_study(tmp_path), slow)
            os._exit(0)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    ran = (tmp_path / "ran.txt").read_text().splitlines()
    assert len(ran) == len(set(ran)) == 2 * 8 + 2 * 2
    summary = summarize(make_study(tmp_path))
    assert (summary["status"], summary["budget"]["verdict"]) == ("complete", "equal")
    assert len(summary["test_reads"]) == 4


# --- budgets


def test_a_trial_does_not_start_when_the_steps_left_do_not_cover_it(tmp_path):
    steps = ["model=tiny_random", "data=boolq", f"trainer.max_steps={STEPS}"]
    study = make_study(tmp_path, base=steps, budget={"unit": "steps", "amount": 3 * STEPS + 4}, seeds=[])
    search.work(study, pretend)
    assert {m: study.spent(m)["steps"] for m in study.plan.methods} == {"loreft": 30, "direft": 30}


def test_trials_of_unknown_cost_start_while_anything_is_left(tmp_path):
    study = make_study(tmp_path, budget={"unit": "tokens", "amount": 250}, seeds=[])
    search.work(study, pretend)
    assert {m: study.spent(m)["tokens"] for m in study.plan.methods} == {"loreft": 300, "direft": 300}


def test_a_method_that_spent_less_is_reported(tmp_path):
    study = make_study(tmp_path, budget={"unit": "tokens", "amount": 200}, seeds=[])
    search.work(study, pretend)
    write_json(tmp_path / "trials" / "loreft" / "0" / "cost.json", {"tokens": 20})
    assert summarize(study)["budget"]["verdict"] == "unequal: loreft has spent 120 tokens, direft 200, of 200"


def test_nominal_operations_are_six_for_each_trained_parameter_and_four_for_each_frozen_one():
    from torch import nn

    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 2, bias=False))
    body, head = model[1].weight, model[2].weight
    assert budget.flops_per_token(model, {"weight": [body, head]}) == 6 * (
        64 + 16
    )  # 6 N, without the embedding
    assert budget.flops_per_token(model, {"weight": [body]}) == 6 * 64 + 4 * 16
    assert budget.flops_per_token(model, {"head": [head]}) == 2 * 64 + 4 * 16  # no gradient below the head
    assert budget.flops_per_token(model, {"weight": []}) == 0
    assert budget.flops_per_token(model, {"weight": [*model.parameters()]}) == 6 * (400 + 64 + 16)


# --- pruning


def report(folder, *values):
    reports = Reports(folder)
    for value in values:
        reports.add(value)
    return reports


def test_successive_halving_keeps_the_best_part(tmp_path):
    settings = {"min_validations": 1, "reduction_factor": 2}
    others = {}
    ends = []
    for i, score in enumerate([0.5, 0.7, 0.6, 0.8, 0.1]):
        own = report(tmp_path, score)
        ends.append(falls_behind(own, others, True, settings))
        others[str(i)] = own
    # the first is alone; 0.7 is best of two; 0.6 second of three, of which one goes on; 0.8 and not 0.1
    assert ends == [False, False, True, False, True]
    assert (
        falls_behind(report(tmp_path, 0.4), {}, True, {"min_validations": 2, "reduction_factor": 2}) is False
    )
    assert falls_behind(report(tmp_path, 0.1), others, False, settings) is False  # a loss: lower is better


def test_a_trial_that_runs_again_is_judged_anew(tmp_path):
    own = report(tmp_path, 0.2)
    assert falls_behind(
        own, {"0": _reached(tmp_path, 0.9)}, True, {"min_validations": 1, "reduction_factor": 2}
    )
    own.write()
    assert Reports(tmp_path).values == {}  # what a trial begins with
    assert Reports.read(tmp_path).rungs == own.rungs == {"completed_rung_0": 0.2}  # what others see


def _reached(folder, value):
    other = report(folder, value)
    falls_behind(other, {}, True, {"min_validations": 1, "reduction_factor": 2})
    return other


# --- winners


def test_the_winner_is_the_best_complete_trial_the_first_of_equals(whole):
    best = whole.winner("loreft")
    complete = whole.trials("loreft", "COMPLETE")
    assert best.value == max(t.value for t in complete)
    assert best.number == min(t.number for t in complete if t.value == best.value)


def test_winners_are_tested_once_with_every_seed(whole):
    search.work(whole, pretend)  # a second start changes nothing
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
    search.work(study, pretend)
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
    search.work(study, lambda job: pretend(job) if job.seed is None else "exit status 1\nlost")
    summary = summarize(study)
    assert summary["status"] == "running"
    assert summary["methods"]["loreft"]["winners"]["1"]["status"] == "failed"
    again = make_study(tmp_path, **plan_of)
    search.work(again, pretend)
    assert summarize(again)["status"] == "complete"


# --- the folder


@pytest.fixture
def begun(tmp_path):
    folder = tmp_path / "study"
    folder.mkdir()
    search.write_plan(folder, make_plan(), "val/accuracy", "max", str(tmp_path))
    return folder


def test_a_study_goes_on_with_its_plan(begun):
    found, more = search.read_study_plan(begun)
    assert found == make_plan()
    assert more["monitor"] == "val/accuracy"
    assert search.prepare({"folder": str(begun)}, []) == begun
    with pytest.raises(ValueError, match=r"is missing, or folder=FOLDER of a study"):
        search.prepare({"folder": str(begun / "elsewhere")}, [])


def test_only_the_budget_of_a_study_can_be_raised_and_not_after_the_test(begun):
    search.go_on(begun, ["budget.amount=12"])
    assert search.read_study_plan(begun)[0].amount == 12
    with pytest.raises(ValueError, match="can only be raised"):
        search.go_on(begun, ["budget.amount=4"])
    with pytest.raises(ValueError, match=r"only budget\.amount can be raised"):
        search.go_on(begun, ["sampler=random"])
    (begun / LEDGER).write_text("{}\n")
    with pytest.raises(ValueError, match="more trials would select knowing them"):
        search.go_on(begun, ["budget.amount=20"])


def test_a_folder_keeps_one_plan(begun, tmp_path):
    other = tmp_path / "other.yaml"
    import yaml

    other.write_text(yaml.safe_dump(make_plan(sampler="random").to_dict(), sort_keys=False))
    with pytest.raises(ValueError, match="another plan: sampler differ"):
        search.prepare({"search": str(other), "folder": str(begun)}, [])


# --- processes

SLEEPER = """
import sys, time
from reft_lightning.search.process import end_with_parent
end_with_parent()
print("began", flush=True)
time.sleep(100)
"""


def began(log, process_):
    while "began" not in process.last_lines(log):
        assert process_.poll() is None, process.last_lines(log)
        time.sleep(0.05)


def test_a_trial_dies_with_its_worker_and_holds_the_lock_until_then(tmp_path):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    lock = process.Lock(tmp_path / "locks" / "a")
    assert lock.acquire(wait=False)
    running = process.start(["sleeper"], tmp_path / "log.txt", {}, tmp_path, lock)
    began(tmp_path / "log.txt", running)
    lock.release()
    assert not process.Lock(lock.path).acquire(wait=False)  # the trial holds it still
    process.stop(running)
    assert running.returncode == -signal.SIGKILL
    assert process.Lock(lock.path).acquire(wait=False)
    assert process.said_of(running.returncode) == "killed by SIGKILL (out of memory?)"


def test_a_signal_to_end_interrupts_as_ctrl_c_does():
    before = signal.getsignal(signal.SIGTERM)

    def end():
        with process.interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        end()
    assert signal.getsignal(signal.SIGTERM) == before


def test_how_a_process_ended_is_said(tmp_path):
    assert process.said_of(1) == "exit status 1"
    (tmp_path / "log").write_text("\n".join(map(str, range(50))))
    assert process.last_lines(tmp_path / "log").splitlines() == [str(i) for i in range(30, 50)]


def test_the_command_says_how_it_is_used():
    code = "import sys; sys.argv = ['reft-search']; from reft_lightning.cli import search; search()"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 2
    assert "reft-search search=NAME" in shown.stdout
    with pytest.raises(ValueError, match="workers must be an integer"):
        search.main(["search=small_stsb", "workers=none"])
    with pytest.raises(ValueError, match="arguments are written key=value"):
        search.main(["small_stsb"])
