"""Figures of a benchmark: one number with its noise and its goal, and the files they are written to."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Figure = dict[str, Any]
FOLDS = 4  # parts of the rounds, each of which gives the figure once


def figure(
    what: str,
    value: float,
    *,
    goal: float | None = None,
    better: str = "lower",
    low: float | None = None,
    high: float | None = None,
    unit: str = "ratio",
    note: str = "",
) -> Figure:
    """Return a figure; without ``low`` and ``high`` it counts as exact.

    Args:
        what: names it, the same in every run.
        value: the number.
        goal: to be reached, or None.
        better: ``lower`` or ``higher``.
        low: lower end of what the rounds gave.
        high: upper end.
        unit: of the number.
        note: what a reader must know of it.
    """
    if better not in ("lower", "higher"):
        raise ValueError(f"better must be 'lower' or 'higher'; got {better!r}")
    found = {"what": what, "value": value, "goal": goal, "better": better, "unit": unit}
    found |= {
        "low": value if low is None else min(low, value),
        "high": value if high is None else max(high, value),
    }
    return {**found, "note": note} if note else found


def ratio(what: str, above: Sequence[float], below: Sequence[float], **options: Any) -> Figure:
    """Return the median over rounds of above / below, each over the other of its own round.

    A shared machine is slower for minutes at a time, for both of a round alike; the fastest round of each would compare
    times that lie minutes apart. Its noise: the rounds are dealt to up to four folds, round i to fold i mod k, and each
    gives the ratio once.
    """
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    folds = min(FOLDS, len(ratios))
    found = [statistics.median(ratios[i::folds]) for i in range(folds)]
    return figure(what, statistics.median(ratios), low=min(found), high=max(found), **options)


def fastest(what: str, times: Sequence[float], **options: Any) -> Figure:
    """Return min(times); its noise as in :func:`ratio`."""
    folds = min(FOLDS, len(times))
    found = [min(times[i::folds]) for i in range(folds)]
    return figure(what, min(times), low=min(found), high=max(found), **options)


def is_met(found: Figure) -> bool | None:
    """Whether a figure reaches its goal; None without a goal."""
    if found.get("goal") is None:
        return None
    return found["value"] <= found["goal"] if found["better"] == "lower" else found["value"] >= found["goal"]


def is_lost(before: Figure, now: Figure) -> bool:
    """Whether a goal that was met before is missed now by more than the noise of both measurements.

    Both ends count: the best end of the new interval misses the goal, and the two intervals do not touch.
    """
    if is_met(before) is not True or is_met(now) is not False:
        return False
    if now["better"] == "lower":
        return now["low"] > max(now["goal"], before["high"])
    return now["high"] < min(now["goal"], before["low"])


# --- files -------------------------------------------------------------------------------------------------------


def add_arguments(
    parser: argparse.ArgumentParser,
    out: Path,
    *,
    rounds: int,
    warmup: int | None = 1,
    model: bool = True,
    peers: Sequence[str] = (),
) -> None:
    """Add the arguments that all benchmarks share."""
    if model:
        source = parser.add_mutually_exclusive_group(required=True)
        source.add_argument("--model", type=Path, help="folder of a Hugging Face causal model")
        source.add_argument("--random", action="store_true", help="random weights, shape of SmolLM2-135M")
    for peer in peers:
        parser.add_argument(
            f"--{peer}-python", help=f"python of an environment with {peer}; left out without it"
        )
    parser.add_argument("--rounds", type=int, default=rounds, help=f"timed rounds ({rounds})")
    if warmup is not None:
        parser.add_argument("--warmup", type=int, default=warmup, help=f"rounds before them ({warmup})")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of torch (all cores)")
    parser.add_argument("--out", type=Path, default=out, help="writes OUT.json and OUT.md")


def default_threads() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if platform.system() == "Linux" else os.cpu_count() or 1


def header(question: str, args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Return the facts that stand above every measurement."""
    from reft_lightning.runs.environment import git_commit

    facts = {"question": question}
    if "random" in vars(args):
        facts["model"] = model_name(args)
    facts |= {"date": datetime.now(UTC).date().isoformat(), "commit": git_commit()}
    facts |= {
        name: vars(args)[name] for name in ("threads", "launches", "rounds", "warmup") if name in vars(args)
    }
    return {**facts, "load_after": round(os.getloadavg()[0], 2), **more}


def model_name(args: argparse.Namespace) -> str:
    """Return what the measured model is called."""
    return "random weights, shape of SmolLM2-135M" if args.random else args.model.resolve().name


def write(
    out: Path, facts: Mapping[str, Any], records: Any, figures: Sequence[Figure], text: str = ""
) -> None:
    """Write ``OUT.json`` (facts, figures, records) and ``OUT.md`` (the figures, and ``text``)."""
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {**facts, "figures": list(figures), "records": records}
    out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    line = ", ".join(
        f"{key} {facts[key]}" for key in facts if key not in ("question", "left_out", "versions")
    )
    left_out = [f"Not measured: {name} ({why})." for name, why in facts.get("left_out", {}).items()]
    parts = [f"# {facts['question']}", line, *left_out, table(figures), text]
    out.with_suffix(".md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def table(figures: Sequence[Figure]) -> str:
    """Return the figures as a Markdown table."""
    lines = ["| what | value | rounds | goal | met |", "|---|---|---|---|---|"]
    for found in figures:
        unit = "" if found["unit"] == "ratio" else f" {found['unit']}"
        spread = "" if found["low"] == found["high"] else f"{number(found['low'])} to {number(found['high'])}"
        sign = "at most" if found["better"] == "lower" else "at least"
        goal = "" if found.get("goal") is None else f"{sign} {number(found['goal'])}{unit}"
        met = {True: "yes", False: "no", None: ""}[is_met(found)]
        note = f" ({found['note']})" if found.get("note") else ""
        lines.append(
            f"| {found['what']}{note} | {number(found['value'])}{unit} | {spread} | {goal} | {met} |"
        )
    return "\n".join(lines)


def number(value: float) -> str:
    """Write a number with three digits, whole above a hundred."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def seconds_table(records: Mapping[str, Mapping[str, Any]], base: str) -> str:
    """Return best, median and CPU time of variants, in ratios to one of them, and their peak memory."""
    lines = [
        f"| variant | best / {base} | median / {base} | cpu / {base} | best s | median s | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    below = records[base]
    for name, r in records.items():
        best = min(r["wall"]) / min(below["wall"])
        median = statistics.median(r["wall"]) / statistics.median(below["wall"])
        cpu = min(r["cpu"]) / min(below["cpu"])
        times = f"{min(r['wall']):.4g} | {statistics.median(r['wall']):.4g}"
        lines.append(
            f"| {name} | {best:.3g} | {median:.3g} | {cpu:.3g} | {times} | {r['peak_memory_bytes'] / 1e6:.0f} |"
        )
    return "\n".join(lines)
