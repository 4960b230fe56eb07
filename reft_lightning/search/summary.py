"""``summary.json``: what each method of a study spent, its winner, early endings, and every read of a test split."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..runs.results import read_results
from ..storage.atomic import write_json
from ..terminal.lines import plain_console
from .budget import counted, spent, verdict
from .ledger import test_reads
from .space import brief
from .study import FREE, Study, winner_status
from .study_files import ERROR, SUMMARY

STATES = {"complete": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL", "running": "RUNNING"}


def summarize(study: Study) -> dict[str, Any]:
    """Write the summary of a study to its folder, and return it.

    The keys: ``search``, ``status`` (running, complete), ``monitor``, ``mode``, ``sampler``, ``pruner``,
    ``budget`` (``unit``, ``amount``, ``verdict``), ``test_reads``, and for each of ``methods``: ``trials`` (counts by
    outcome), ``spent`` (in every unit), ``best`` (``number``, ``value``, ``params``, ``edges``, ``folder``),
    ``winners`` (seed -> ``folder``, ``status``, ``metrics``), ``failed`` (number -> error), ``gave_up`` (why it ended
    before its budget, or an empty string). Folders are relative to the study's.
    """
    plan, budget = study.plan, study.plan.budget
    with study.turn:  # one writer at a time
        methods = {method: _method(study, method) for method in plan.methods}
        winners = [winner for method in methods.values() for winner in method["winners"].values()]
        tested = all(winner["status"] == "complete" for winner in winners)
        method, running = study.next_method()
        found = verdict(budget.unit, budget.amount, {name: each["spent"] for name, each in methods.items()})
        values = {
            "search": plan.name, "status": "complete" if tested and not method and not running else "running",
            "monitor": study.monitor, "mode": "max" if study.maximize else "min",
            "sampler": plan.sampler, "pruner": plan.pruner,
            "budget": {"unit": budget.unit, "amount": budget.amount, "verdict": found},
            "methods": methods, "test_reads": test_reads(study.folder),
        }  # fmt: skip
        write_json(study.folder / SUMMARY, values)
    return values


def _method(study: Study, method: str) -> dict[str, Any]:
    trials, best = study.trials(method), study.best(method)
    found = counted(trials)
    return {
        "trials": {name: sum(t.state.name == state for t in found) for name, state in STATES.items()},
        "spent": spent(trials),
        "best": None if best is None else {
            "number": best.number, "value": best.value, "params": best.params,
            "edges": study.edges(method, best.params), "folder": best.user_attrs["folder"],
        },
        "winners": {
            str(job["seed"]): _winner(study, folder, job) for folder, job in study.winners() if job["method"] == method
        },
        "failed": {str(t.number): t.user_attrs.get("error") for t in found if t.state.name == "FAIL"},
        "gave_up": f"{FREE} trials in a row cost no {study.plan.budget.unit}" if study.gave_up(method, trials) else "",
    }  # fmt: skip


def _winner(study: Study, folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    status = winner_status(folder, job)
    metrics = read_results(folder).get("metrics", {}) if status == "complete" else {}
    return {
        "folder": str(folder.relative_to(study.folder)), "status": status,
        "metrics": {name: value for name, value in metrics.items() if "test/" in name or "val/" in name},
        **({"error": (folder / ERROR).read_text(encoding="utf-8")} if status == "failed" else {}),
    }  # fmt: skip


def remarks_of(method: Mapping[str, Any]) -> list[str]:
    """Return remarks on a method's winner and on how its search ended, from its part of a summary."""
    edges = (method.get("best") or {}).get("edges")
    remarks = [f"the winner is {', '.join(edges)}; values beyond were not tried"] if edges else []
    if method.get("gave_up"):
        remarks.append(f"it ended before its budget: {method['gave_up']}")
    return remarks


def print_summary(values: dict[str, Any], folder: Path) -> None:
    """Print one line for each method, the verdict on the budgets, and the number of reads of test splits."""
    from rich.markup import escape
    from rich.table import Table

    console = plain_console(140)
    unit, score = values["budget"]["unit"], values["monitor"].replace("val/", "test/", 1)
    table = Table(title=f"search {escape(values['search'])}: best {values['monitor']} of each method")
    ended = ("complete", "pruned", "failed")
    for column in ("method", values["monitor"], "trial", "parameters", *ended, unit, score):
        table.add_column(column, justify="left" if column in ("method", "parameters") else "right")
    remarks = []
    for name, method in values["methods"].items():
        best = method["best"]
        won = ["-", "-", "none complete"]
        if best is not None:
            won = [f"{best['value']:.4f}", str(best["number"]), " ".join(brief(best["params"]))]
        remarks += [f"{name}: {remark}" for remark in remarks_of(method)]
        tested = [value for w in method["winners"].values() if (value := w["metrics"].get(score)) is not None]
        mean = f"{sum(tested) / len(tested):.4f} ({len(tested)})" if tested else "-"
        counts = [str(method["trials"][state]) for state in ended]
        table.add_row(name, *map(escape, won), *counts, f"{method['spent'][unit]:.6g}", mean)
    console.print(table)
    reads = values["test_reads"]
    again = sum(bool(read.get("again")) for read in reads)
    remarks += [
        f"budget of each method: {values['budget']['amount']:g} {unit}; {values['budget']['verdict']}",
        f"reads of a test split: {len(reads)}" + (f", {again} of them after the first" if again else ""),
        f"study folder   {folder}",
        f"report         {shlex.join(['reft-report', str(folder), f'out={folder}/report'])}",
    ]
    for remark in remarks:
        console.print(remark, soft_wrap=True, markup=False)
