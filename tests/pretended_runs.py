"""Studies whose runs only write what a run writes, for tests of everything around the runs."""

import json

from reft_lightning.search import command, search_plan
from reft_lightning.search.study import Study
from reft_lightning.search.study_files import LEDGER, read_job
from reft_lightning.search.worker import Worker
from reft_lightning.storage.atomic import write_json

STEPS = 10  # of a trial of the runs below


class Killed(BaseException):
    """Ends a worker as a kill does: nothing is told to Optuna."""


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
    return search_plan.parse_plan("test", values | changes)


def make_study(folder, storage=None, **changes):
    command.begin_study(folder, make_plan(**changes), "val/accuracy", "max", storage)
    return Study(folder)


def work(study, run=None):
    """Run what is left of a study, as the command does; ``run(folder)`` pretends a run."""
    study.start()
    work_with_others(study, run)


def work_with_others(study, run=None):
    def runner(folder, alive):
        return run(folder) if run is not None else pretend(study, folder)

    Worker(study, runner).work()


def spend(study, job, **cost):
    """Note what a trial has spent; return Optuna's trial."""
    number = study.trials(job["method"])[job["number"]]._trial_id
    trial = study.optuna.trial.Trial(study.studies[job["method"]], number)
    trial.set_user_attr("cost", cost)
    return trial


def write_results(folder, status, **metrics):
    values = {"metrics": {f"{name.replace('_', '/')}": value for name, value in metrics.items()}}
    found = {"status": status, "test_reads": [], "config_hash": f"hash {folder.name}", **values}
    write_json(folder / "results.json", found)


def pretend(study, folder):
    """Write what a run writes: a score by the parameters; some fail, and some are pruned."""
    job = read_job(folder)
    if job["kind"] == "winner":
        line = {"time": "2026-01-01", "method": job["method"], "seed": job["seed"], "config_hash": "h",
                "model": "adapted", "folder": str(folder)}  # fmt: skip
        with (study.folder / LEDGER).open("a") as file:
            file.write(json.dumps(line) + "\n")
        write_results(folder, "complete", val_accuracy=0.5, test_accuracy=0.25 * job["seed"])
        return ""
    score = 1 - abs(job["params"]["optimizer.lr"] - 0.01) * 10 + job["params"]["intervention.rank"] / 100
    spend(study, job, steps=STEPS, tokens=100, seconds=1.5).report(score / 2, 1)
    if job["number"] % 5 == 3:
        return "exit status 1\nthe last line of its log"
    write_results(folder, "pruned" if job["number"] % 4 == 2 else "complete", val_accuracy=score)
    return ""


def trials_of(study):
    """Everything of a study's trials that their times do not decide."""
    return {
        method: [
            (t.number, t.params, t.state.name, t.value, t.intermediate_values, t.user_attrs.get("error"))
            for t in study.trials(method)
        ]
        for method in study.plan.methods
    }
