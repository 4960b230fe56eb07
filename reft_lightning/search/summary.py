"""``summary.json``: what a study did, what each method spent, who won, and every read of a test split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..storage.atomic import write_json
from .budget import FREE, behind_trials, verdict
from .study import ERROR_FILE, LEDGER, Study


def summarize(study: Study, write: bool = True) -> dict[str, Any]:
    """Return the summary of a study, and write it to its folder.

    The keys: ``search``, ``status`` (running, complete), ``monitor``, ``mode``, ``sampler``, ``pruner``,
    ``budget`` (``unit``, ``amount``, ``verdict``), ``test_reads``, and for each of ``methods``: ``trials`` (counts by
    outcome), ``spent`` (in every unit), ``best`` (``number``, ``value``, ``params``, ``edges``, ``folder``),
    ``winners`` (seed -> ``folder``, ``status``, ``metrics``), ``failed`` (number -> error), ``gave_up`` (why it ended
    before its budget; empty where it did not). Folders are relative to the study's.
    """
    with study.lock:
        methods = {method: _method(study, method) for method in study.plan.methods}
        plan = study.plan
        spent = {method: found["spent"] for method, found in methods.items()}
        equal = verdict(plan.unit, plan.amount, {method: each[plan.unit] for method, each in spent.items()})
        values = {
            "search": plan.name,
            "status": "complete" if study.searched() and study.tested() else "running",
            "monitor": study.monitor, "mode": "max" if study.maximize else "min",
            "sampler": plan.sampler, "pruner": plan.pruner,
            "budget": {
                "unit": plan.unit, "amount": plan.amount,
                "verdict": "; ".join(filter(None, (equal, behind_trials(plan.unit, spent)))),
            },
            "methods": methods,
            "test_reads": test_reads(study.folder),
        }  # fmt: skip
        if write:
            write_json(study.folder / "summary.json", values)
    return values


def test_reads(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of the ledger, and reads of winners' test rows by ``reft-eval`` since.

    ``again`` marks those after the first of a method, a seed and a model.
    """
    path = folder / LEDGER
    lines = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    )
    for results in sorted(folder.glob("winners/*/seed_*/results.json")):
        values = json.loads(results.read_text(encoding="utf-8"))
        method, seed = results.parent.parent.name, int(results.parent.name.removeprefix("seed_"))
        lines += [
            {"time": read["time"], "method": method, "seed": seed, "config_hash": read.get("config_hash"),
             "model": read["model"], "folder": str(results.parent)}
            for read in values["test_reads"]
            if read["time"] > values.get("finished", "~")
        ]  # fmt: skip
    seen: set[tuple[Any, ...]] = set()
    for line in lines:
        key = (line["method"], line["seed"], line["model"])
        if key in seen:
            line["again"] = True
        seen.add(key)
    return lines


def _method(study: Study, method: str) -> dict[str, Any]:
    trials = study.trials(method)
    names = ("complete", "pruned", "fail", "running")
    best = study.winner(method)
    return {
        "trials": {name.replace("fail", "failed"): sum(t.state.name.lower() == name for t in trials) for name in names},
        "spent": study.spent(method),
        "best": None if best is None else {
            "number": best.number, "value": best.value, "params": best.params,
            "edges": _edges(study, method, best.params), "folder": best.user_attrs["folder"],
        },
        "winners": {str(seed): _winner(study, folder) for m, seed, folder in study.winners() if m == method},
        "failed": {str(t.number): t.user_attrs.get("error") for t in trials if t.state.name == "FAIL"},
        "gave_up": f"{FREE} trials in a row cost no {study.plan.unit}" if study.gave_up(method) else "",
    }  # fmt: skip


def _edges(study: Study, method: str, params: dict[str, Any]) -> list[str]:
    """Return at which edges of its space a winner lies: beyond, there may be a better one."""
    found = [(d.edge(params[d.name]), d.name) for d in study.plan.methods[method].space]
    return [f"at the {edge} edge of {name}" for edge, name in found if edge]


def _winner(study: Study, folder: Path) -> dict[str, Any]:
    results = study.results(folder)
    metrics = {
        name: value for name, value in results.get("metrics", {}).items() if "test/" in name or "val/" in name
    }
    error = folder / ERROR_FILE
    status = "failed" if error.is_file() else results.get("status", "waiting")
    return {
        "folder": str(folder.relative_to(study.folder)), "status": status, "metrics": metrics,
        **({"error": error.read_text(encoding="utf-8")} if error.is_file() else {}),
    }  # fmt: skip


def print_summary(values: dict[str, Any], folder: Path, console: Any = None) -> None:
    """Print a line a method, the verdict on the budgets, and the reads of test splits."""
    import sys

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console(width=None if sys.stdout.isatty() else 140)
    unit = values["budget"]["unit"]
    table = Table(title=f"search {escape(values['search'])}: best {values['monitor']} of each method")
    columns = ["method", values["monitor"], "trial", "parameters", "complete", "pruned", "failed", unit]
    # other scores stand in summary.json, and in the report
    score = values["monitor"].replace("val/", "test/", 1)
    tested = [score] if any(m["winners"] for m in values["methods"].values()) else []
    for column in (*columns, *tested):
        table.add_column(column, justify="left" if column in ("method", "parameters") else "right")
    for name, method in values["methods"].items():
        best, trials = method["best"], method["trials"]
        won = ["-", "-", "none complete"] if best is None else [
            f"{best['value']:.4f}", str(best["number"]), " ".join(f"{k}={v}" for k, v in best["params"].items())
        ]  # fmt: skip
        table.add_row(
            name, won[0], won[1], escape(won[2]), *(str(trials[k]) for k in ("complete", "pruned", "failed")),
            f"{method['spent'][unit]:.6g}", *(_mean(method["winners"], score) for score in tested),
        )  # fmt: skip
    console.print(table)
    for name, method in values["methods"].items():
        if method["best"] and method["best"]["edges"]:
            where = ", ".join(method["best"]["edges"])
            console.print(
                f"{name}: the winner lies {where}; beyond, nothing was tried", soft_wrap=True, markup=False
            )
        if method["gave_up"]:
            console.print(
                f"{name}: ended before its budget: {method['gave_up']}", soft_wrap=True, markup=False
            )
    console.print(
        f"budget of each method: {values['budget']['amount']:g} {unit}; {values['budget']['verdict']}",
        soft_wrap=True,
    )
    reads = values["test_reads"]
    again = sum(bool(read.get("again")) for read in reads)
    console.print(
        f"reads of a test split: {len(reads)}" + (f", {again} of them after the first" if again else "")
    )
    console.print(f"[bold]study folder[/bold]  {escape(str(folder))}", soft_wrap=True)


def _mean(winners: dict[str, Any], score: str) -> str:
    found = [w["metrics"][score] for w in winners.values() if score in w["metrics"]]
    return f"{sum(found) / len(found):.4f} ({len(found)})" if found else "-"
