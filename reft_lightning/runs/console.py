"""The table at the end of a run."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from ..config.overrides import key_of
from ..evaluation.row_metrics import mean_of_counts
from ..terminal.lines import plain_console

# clearer names for some measures
HEADINGS = {"option_accuracy": "option likelihood", "rouge_l": "ROUGE-L"}
MAJORITY = "majority_accuracy"
OTHER = {"loreft": "direft", "direft": "loreft"}  # methods with the same settings


def print_table(results: dict[str, Any], console: Console | None = None) -> None:
    """Print a run's scores, frozen base and adapted model with 95 % intervals, and its costs."""
    console = console or plain_console()
    for line in [*_print_scores(results, console), *_costs(results)]:
        console.print(line, soft_wrap=True)
    for name, said in _commands(results):
        # a sweep's folders have brackets, which rich reads as markup
        console.print(f"[bold]{name:<16}[/bold] {escape(said)}", soft_wrap=True, highlight=False)


def _print_scores(results: dict[str, Any], console: Console) -> list[str]:
    """Print the table of scores; return the notes to print below it."""
    split = "test" if any("test" in name.split("/") for name in results["metrics"]) else "val"
    scores = _scores(results, split)
    if not scores:
        return ["nothing was evaluated: there are no test rows and no validation rows"]
    measures = list(dict.fromkeys(measure for _, _, measure in scores if measure != MAJORITY))
    table = _empty_table(results, split, measures)
    notes: list[str] = []
    constants: dict[str, list[str]] = {}  # task -> row of the most common answer
    models = _models(results, scores)
    for prefix, label, trained in models:
        tasks = list(dict.fromkeys(task for p, task, _ in scores if p == prefix))
        for task in tasks:
            counts = [results["counts"].get(scores.get((prefix, task, measure))) for measure in measures]
            total = next((str(count["total"]) for count in counts if count), "")
            cells = [_cell(results, scores.get((prefix, task, measure), "")) for measure in measures]
            table.add_row(label, task or "all", total, *cells, *trained)
            if missing := (counts[0] or {}).get("missing") if counts else None:
                notes.append(f"{label}, {task}: no answer in {missing} of {total} rows")
            if constant := scores.get((prefix, task, MAJORITY)):
                answer = results.get("commonest_answers", {}).get(task)
                name = f"always {answer!r}" if answer else "commonest answer"
                constants[task] = _constant(name, task, total, measures, _cell(results, constant))
        if len(tasks) > 1:
            cells = [_mean_cell(results, f"{prefix}{split}", tasks, measure) for measure in measures]
            table.add_row(label, "mean of tasks", "", *cells, *trained, end_section=True)
    if len(constants) > 1:
        mean = _mean_cell(results, split, list(constants), MAJORITY)
        constants = {"": _constant("always the commonest", "mean of tasks", "", measures, mean)}
    for row in constants.values():
        table.add_row(*row)
    if not _print_within(table, console):
        costs = [(label, *trained) for _, label, trained in models if trained[0] not in ("", "0")]
        notes += [f"{label}: {count} trained, {share} % of base" for label, count, share in costs]
    return notes


def _scores(results: dict[str, Any], split: str) -> dict[tuple[str, str, str], str]:
    """Return (``base/`` or nothing, task or nothing, measure) -> name of each score of a split."""
    parts = {name: _split(name) for name in (*results["counts"], *_losses(results, split))}
    scores = {
        (prefix, task, measure): name for name, (prefix, s, task, measure) in parts.items() if s == split
    }
    tasks = {task for _, task, _ in scores if task}
    if len(tasks) == 1:  # the loss over all rows goes in the task's row
        scores = {(prefix, task or next(iter(tasks)), m): name for (prefix, task, m), name in scores.items()}
    return scores


def _empty_table(results: dict[str, Any], split: str, measures: list[str]) -> Table:
    rows = "test" if split == "test" else "validation"
    shares = ", in % [95 % interval]" if {*measures} - {"loss", "perplexity"} else ""
    table = Table(title=f"{escape(str(results['model']))}, {rows} rows{shares}")
    headings = HEADINGS | ({"accuracy": "generated"} if "option_accuracy" in measures else {})
    scored = [headings.get(measure, measure.replace("_", " ")) for measure in measures]
    for column in ("", "task", "rows", *scored, "trained", "% of base"):
        left = column in ("", "task")
        table.add_column(column, justify="left" if left else "right", no_wrap=column != "")
    return table


def _constant(name: str, task: str, total: str, measures: list[str], accuracy: str) -> list[str]:
    """Return the row of a constant answer, which has an accuracy and trains nothing."""
    return [name, task, total, *(accuracy if measure == "accuracy" else "" for measure in measures), "0", "0"]


def _costs(results: dict[str, Any]) -> list[str]:
    """Return lines on the chosen checkpoint and the cost of training and evaluation."""
    lines: list[str] = []
    if "chosen_by" in results:
        lines.append(
            f"checkpoint of step {results['best_step']} of {results['steps']}: {results['chosen_by']}"
        )
    if "train_seconds" in results:
        took = f"with {results.get('shared_base', 1) - 1} others on one base model ({results['steps']} steps)"
        if results["train_seconds"] is not None:
            took = (
                f"{results['train_seconds']:.0f} s ({results['steps']} steps, "
                f"{results['tokens_per_second']:.0f} tokens/s)"
            )
        lines.append(
            f"training {took}, evaluation {sum(results.get('seconds', {}).values()):.0f} s, "
            f"peak memory {_gibibytes(results['peak_memory_bytes'])}, seed {results['seed']}"
        )
    return lines


def _commands(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Return where the results are, and commands for possible next steps."""
    folder = results["run_dir"]
    lines = [("run folder", str(folder))]
    if "evaluation_dir" in results:
        return [*lines, ("evaluation", results["evaluation_dir"])]
    if results.get("base_task") != "sequence_classification":
        lines.append(("chat with both", shlex.join(["reft-chat", f"run={folder}"])))
    lines.append(("evaluate again", shlex.join(["reft-eval", f"run={folder}", "split=validation"])))
    if "split" not in results and results["trainable_parameters"] + results.get("head_parameters", 0):
        lines += _next_experiments(results.get("command", ""), results["method"])
    return lines


def _print_within(table: Table, console: Console) -> bool:
    """Print a table; if it is too wide, drop its last two columns and vertical rules. Return whether it fitted."""
    fits = Measurement.get(console, console.options.update(max_width=1000), table).maximum <= console.width
    if not fits:
        table.box, table.pad_edge = SIMPLE_HEAD, False
        del table.columns[-2:]
    console.print(table)
    return fits


def _mean_cell(results: dict[str, Any], path: str, tasks: list[str], measure: str) -> str:
    """Return the mean of a measure over tasks with its interval; a dash if a task lacks the measure."""
    found = mean_of_counts([results["counts"].get(f"{path}/{task}/{measure}") for task in tasks])
    return "-" if found is None else _percent(*found)


def _percent(value: float, low: float, high: float) -> str:
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _next_experiments(command: str, method: str) -> list[tuple[str, str]]:
    """Return shell-quoted commands that repeat the run with three seeds, and with another method."""
    if not command:
        return []
    program, *words = shlex.split(command)
    same = [word for word in words if key_of(word) not in ("resume", "overwrite", "trust_code")]
    rest = [word for word in same if key_of(word) != "seed"]
    found = [("three seeds", shlex.join([program, "-m", *rest, "seed=42,43,44"]))]
    # the first would set the method back, the second would not fit another
    fixed = {"intervention.method", "intervention.init_from"}
    if method in OTHER and not fixed & set(map(key_of, words)):
        rest = [word for word in same if key_of(word) != "intervention"]
        found.append(("another method", shlex.join([program, *rest, f"intervention={OTHER[method]}"])))
    return found


def _gibibytes(count: int | None) -> str:
    return "unknown, as the process ran other runs" if count is None else f"{count / 2**30:.1f} GiB"


def _split(name: str) -> tuple[str, str, str, str]:
    """Return (prefix, split, task or nothing, measure) of a score's name."""
    prefix = "base/" if name.startswith("base/") else ""
    split, *task, measure = name.removeprefix("base/").split("/")
    return prefix, split, "/".join(task), measure


def _losses(results: dict[str, Any], split: str) -> list[str]:
    """Return the names of the losses to show: if a loss was monitored, or if all scores are 0."""
    scored = [
        c for name, c in results["counts"].items() if _split(name)[1] == split and not name.endswith(MAJORITY)
    ]
    if any(count.get("correct", 1) for count in scored) and not str(results.get("monitor")).endswith("loss"):
        return []
    shown = (f"{split}/loss", f"{split}/perplexity")
    return [name for name in results["metrics"] if name.removeprefix("base/") in shown]


def _models(
    results: dict[str, Any], scores: Iterable[tuple[str, str, str]]
) -> list[tuple[str, str, tuple[str, str]]]:
    """Return (prefix of scores, label, trained parameters and percent) of the frozen base and the adapted model."""
    prefixes = {prefix for prefix, _, _ in scores}
    rows = []
    if "base/" in prefixes:
        rows.append(("base/", "frozen base", ("0", "0")))
    if "" in prefixes:
        count = share = ""
        if "percent" in results:
            count, share = f"{results['trainable_parameters']:,}", f"{results['percent']:.3f}"
        if heads := results.get("head_parameters"):
            count += f" + head {heads:,}"
        rows.append(("", results["method"], (count, share)))
    return rows


def _cell(results: dict[str, Any], name: str) -> str:
    count = results["counts"].get(name)
    value = results["metrics"].get(name)
    if name in results["metrics"] and (value is None or math.isnan(value)):  # JSON without NaN holds null
        return "not a number"
    if name.endswith(("/loss", "/perplexity")):
        return f"{value:.4f}"
    if not count:
        return "-"
    if value is None:
        value = count["correct"] / count["total"]
    return _percent(value, *count["interval"])
