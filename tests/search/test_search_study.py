"""The trials of a study: kills, failures, workers, budgets and pruning, with runs that only write what a run writes."""

import os
import random
import signal
import time

import pytest
from pretended_runs import STEPS, make_study, pretend, trials_of

from reft_lightning.search import budget, command
from reft_lightning.search.pruning import Reports, falls_behind
from reft_lightning.search.summary import summarize
from reft_lightning.storage.atomic import write_json


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study that nothing interrupted."""
    study = make_study(tmp_path_factory.mktemp("whole"))
    command.work(study, pretend)
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
    command.work(study, diverge)
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
            command.work(make_study(tmp_path), pretend)
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
        command.work(make_study(tmp_path, budget={"unit": "trials", "amount": 1}, seeds=[]), fail)
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

            command.work(make_study(tmp_path), slow)
            os._exit(0)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    ran = (tmp_path / "ran.txt").read_text().splitlines()
    assert len(ran) == len(set(ran)) == 2 * 8 + 2 * 2
    summary = summarize(make_study(tmp_path))
    assert (summary["status"], summary["budget"]["verdict"]) == ("complete", "equal")
    assert len(summary["test_reads"]) == 4


def test_no_winner_is_tested_while_another_worker_leaves_a_trial_behind(tmp_path, monkeypatch):
    plan_of = {"budget": {"unit": "trials", "amount": 2}, "seeds": [1]}
    study = make_study(tmp_path, **plan_of)
    held = make_study(tmp_path, **plan_of).take_trial()
    ran, look = [], study.take_trial

    def look_and_lose_the_other():
        job = look()
        if job is None:
            held.lock.release()  # as its worker does when it is killed, after this one has looked
        return job

    def run(job):
        ran.append(job)
        return pretend(job)

    monkeypatch.setattr(study, "take_trial", look_and_lose_the_other)
    monkeypatch.setattr(command, "WAIT", 0.0)
    command.work(study, run)
    assert [job.seed for job in ran] == [None] * 4 + [1, 1]
    assert held.name in [job.name for job in ran]


def test_no_winner_is_taken_while_a_trial_runs_or_is_still_to_run(tmp_path):
    study = make_study(tmp_path, budget={"unit": "trials", "amount": 1}, seeds=[1])
    for method in ("loreft", "direft"):
        assert study.take_winner() is None
        job = study.take_trial()
        assert job.method == method
        assert study.take_winner() is None
        study.prepare(job)
        assert study.tell_trial(job, pretend(job)) == "complete"
    assert study.take_winner().name == "loreft 0, seed 1"


# --- budgets


def test_a_method_ends_when_its_trials_fail_before_they_cost_anything(tmp_path, capsys, caplog):
    ran = []

    def lose_direft(job):
        ran.append(job)
        assert len(ran) < 20, "it would never end"
        return "exit status 1\nno such file" if job.method == "direft" else pretend(job)

    plan_of = {"budget": {"unit": "tokens", "amount": 250}, "seeds": []}
    study = make_study(tmp_path, **plan_of)
    command.work(study, lose_direft)
    assert [t.state.name for t in study.trials("direft")] == ["FAIL"] * budget.FREE
    assert study.spent("loreft")["tokens"] == 300
    summary = summarize(study)
    assert {m: v["gave_up"] for m, v in summary["methods"].items()} == {
        "loreft": "", "direft": "3 trials in a row cost no tokens"
    }  # fmt: skip
    command.write_plan(tmp_path, study.plan, "val/accuracy", "max", str(tmp_path))
    with pytest.raises(SystemExit):
        command._report(tmp_path, study.since)
    assert "direft: ended before its budget: 3 trials in a row cost no tokens" in capsys.readouterr().out
    assert f"mend the cause, which stands in {tmp_path / 'summary.json'}" in caplog.text
    again = make_study(tmp_path, **plan_of)  # the next start, when the cause is mended
    command.work(again, pretend)
    assert (again.spent("direft")["tokens"], again.spent("loreft")["tokens"]) == (300, 300)
    assert summarize(again)["methods"]["direft"]["gave_up"] == ""


def test_a_trial_does_not_start_when_the_steps_left_do_not_cover_it(tmp_path):
    steps = ["model=tiny_random", "data=boolq", f"trainer.max_steps={STEPS}"]
    study = make_study(tmp_path, base=steps, budget={"unit": "steps", "amount": 3 * STEPS + 4}, seeds=[])
    command.work(study, pretend)
    assert {m: study.spent(m)["steps"] for m in study.plan.methods} == {"loreft": 30, "direft": 30}


def test_trials_of_unknown_cost_start_while_anything_is_left(tmp_path):
    study = make_study(tmp_path, budget={"unit": "tokens", "amount": 250}, seeds=[])
    command.work(study, pretend)
    assert {m: study.spent(m)["tokens"] for m in study.plan.methods} == {"loreft": 300, "direft": 300}


def test_a_method_that_spent_less_is_reported(tmp_path):
    study = make_study(tmp_path, budget={"unit": "tokens", "amount": 200}, seeds=[])
    command.work(study, pretend)
    write_json(tmp_path / "trials" / "loreft" / "0" / "cost.json", {"tokens": 20})
    assert summarize(study)["budget"]["verdict"] == "unequal: loreft has spent 120 tokens, direft 200, of 200"


def test_trials_of_other_lengths_are_said_where_trials_are_counted(tmp_path):
    def shorter(job):
        ended = pretend(job)
        if job.method == "direft":
            write_json(job.folder / "cost.json", {"steps": STEPS - 2, "tokens": 100})
        return ended

    study = make_study(tmp_path, budget={"unit": "trials", "amount": 2}, seeds=[])
    command.work(study, shorter)
    assert summarize(study)["budget"]["verdict"] == (
        "equal; trials were not equally long: direft 16 steps and loreft 20, 1.25 times as many"
    )
    costs = {"a": {"steps": 1000, "tokens": 0}, "b": {"steps": 1009, "tokens": 7}}
    assert budget.behind_trials("trials", costs) == "trials were not equally long: a 0 tokens and b 7"
    assert budget.behind_trials("steps", costs) == ""


def test_embeddings_that_are_the_head_too_are_multiplied():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    apart, tied = (
        LlamaForCausalLM(LlamaConfig(vocab_size=50, tie_word_embeddings=tie, **sizes))
        for tie in (False, True)
    )
    assert sum(p.numel() for p in apart.parameters()) - sum(p.numel() for p in tied.parameters()) == 50 * 16
    roles = [{"weight": [model.model.layers[0].mlp.up_proj.weight]} for model in (apart, tied)]
    assert budget.flops_per_token(apart, roles[0]) == budget.flops_per_token(tied, roles[1])


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
