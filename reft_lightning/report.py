"""The table that a run ends with."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .evaluation import wilson_interval


def print_table(results: dict[str, Any], console: Console | None = None) -> None:
    """Print what a run obtained: frozen base against adapted model, with 95 % intervals, and what it cost."""
    console = console or Console()
    split = "test" if any(name.startswith(("test/", "base/test/")) for name in results["counts"]) else "val"
    rows = "test" if split == "test" else "validation"
    table = Table(title=f"{escape(str(results['model']))}, {rows} rows, accuracy in % [95 % interval]")
    for column in ("", "task", "rows", "generated", "option likelihood", "trained", "% of base"):
        table.add_column(column, justify="left" if column in ("", "task") else "right")
    missing: list[str] = []
    baselines: dict[str, tuple[str, ...]] = {}
    for prefix, label, count in _rows(results):
        names = [name.split("/")[-2] for name in results["counts"] if name.startswith(f"{prefix}{split}/")]
        for task in dict.fromkeys(names):
            scores = {name: results["counts"].get(f"{prefix}{split}/{task}/{name}")
                      for name in ("accuracy", "option_accuracy", "majority_accuracy")}  # fmt: skip
            if majority := scores["majority_accuracy"]:
                answer = results.get("commonest_answers", {}).get(task)
                baselines[task] = (f"always {answer!r}" if answer else "commonest answer", task,
                                   str(majority["total"]), _score(majority), "", "0", "0")  # fmt: skip
            total = next(score["total"] for score in scores.values() if score)
            table.add_row(
                label, task, str(total), _score(scores["accuracy"]), _score(scores["option_accuracy"]), *count
            )
            if scores["accuracy"] and scores["accuracy"]["missing"]:
                missing.append(f"{label}, {task}: {scores['accuracy']['missing']} of {total} generated texts "
                               "hold no answer in the format")  # fmt: skip
    for row in baselines.values():
        table.add_row(*row)
    console.print(table)
    for line in missing:
        console.print(line, soft_wrap=True)
    if "train_seconds" in results:
        seconds = results["seconds"]
        console.print(
            f"training {results['train_seconds']:.0f} s ({results['steps']} steps, "
            f"{results['tokens_per_second']:.0f} tokens/s), evaluation {sum(seconds.values()):.0f} s, "
            f"peak memory {results['peak_memory_bytes'] / 2**30:.1f} GiB, seed {results['seed']}"
        )
    folder = escape(str(results["run_dir"]))  # a sweep's folders have brackets, which rich reads as markup
    console.print(f"[bold]run folder[/bold]  {folder}", soft_wrap=True)
    console.print(f"talk to both     reft-chat run={folder}", soft_wrap=True)
    console.print(f"evaluate again   reft-eval run={folder} split=validation", soft_wrap=True)
    console.print(
        "change a thing   the same command and intervention=direft, or -m seed=42,43,44", soft_wrap=True
    )


def _rows(results: dict[str, Any]) -> list[tuple[str, str, tuple[str, str]]]:
    rows = []
    if any(name.startswith("base/") for name in results["counts"]):
        rows.append(("base/", "frozen base", ("0", "0")))
    if any(not name.startswith("base/") for name in results["counts"]):
        trained = (
            (f"{results['trainable_parameters']:,}", f"{results['percent']:.3f}")
            if "percent" in results
            else ("", "")
        )
        rows.append(("", results["method"], trained))
    return rows


def _score(count: dict[str, Any] | None) -> str:
    if not count:
        return "-"
    low, high = wilson_interval(count["correct"], count["total"])
    return f"{100 * count['correct'] / count['total']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
