"""Studies whose runs only write what a run writes, for tests of everything around the runs."""

import json

from reft_lightning.search import search_plan
from reft_lightning.search.pruning import Reports
from reft_lightning.search.study import LEDGER, Study
from reft_lightning.storage.atomic import write_json

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
    return search_plan.parse_plan("test", values | changes)


def make_study(folder, since=None, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    return Study(folder, make_plan(**changes), "val/accuracy", True, since=since)


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
