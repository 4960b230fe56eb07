"""Collect the results of runs for the rows of the paper's tables: scores by seed, and which settings were changed."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...config.compose import CompositionError, compose, config_dir
from ...config.identity import differences
from ...config.schema import Config
from ...storage.reading import read_json, read_yaml
from .published import AVERAGE, GROUP, WIN_RATE, Printed

log = logging.getLogger(__name__)


# A win rate is comparable only with the paper's judge and reference on all of AlpacaEval; 1 % may be unjudged.
JUDGE, REFERENCE = "alpaca_eval_gpt4", "text_davinci_003"
INSTRUCTIONS, MOST_UNJUDGED = 805, 8


@dataclass
class Obtained:
    """Runs of one experiment with the same settings."""

    # differences from the experiment's own settings, such as "data.limit_train=100"
    changed: tuple[str, ...]
    scores: dict[int, dict[str, float]] = field(default_factory=dict)  # seed -> the paper's name -> percent
    notes: list[str] = field(default_factory=list)  # notes for the reader


def read_runs(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return (run folder, results) for all runs below a folder that belong to an experiment of the paper."""
    runs = []
    for path in sorted(folder.rglob("results.json")):
        try:
            results = read_json(path)
        except ValueError as error:
            log.warning("left out: %s", error)
            continue
        if str(results.get("experiment") or "").startswith(f"{GROUP}/"):
            runs.append((path.parent, results))
    return runs


def compare(row: Printed, runs: Iterable[tuple[Path, dict[str, Any]]]) -> list[Obtained]:
    """Return the runs of a row, grouped by their changed settings, the unchanged ones first.

    If several complete runs have the same seed and settings, the last one counts, and a note says so.
    """
    groups: dict[tuple[str, ...], Obtained] = {}
    mine = [run for run in runs if run[1]["experiment"] == row.experiment]
    expected = composed(row) if mine else None
    for folder, results in sorted(mine, key=lambda run: str(run[1].get("finished", ""))):
        changed = _changes(folder / "config.yaml", expected)
        group = groups.setdefault(changed, Obtained(changed))
        seed = int(results["seed"])
        if results.get("status") != "complete":
            group.notes.append(f"seed {seed} is {results.get('status')}, not complete: {folder}")
            continue
        if seed in group.scores:
            group.notes.append(f"seed {seed} ran more than once: the last complete run counts")
        group.scores[seed] = _scores(row, folder, results, group.notes)
        group.notes += _data_notes(results.get("data_versions", {}))
    for group in groups.values():
        group.notes = list(dict.fromkeys(group.notes))
    return sorted(groups.values(), key=lambda group: (len(group.changed), group.changed))


def _scores(row: Printed, folder: Path, results: Mapping[str, Any], notes: list[str]) -> dict[str, float]:
    scores = {}
    for name, (_, _, task, measure) in row.numbers.items():
        if task == WIN_RATE:
            if (rate := _win_rate(folder, notes)) is not None:
                scores[name] = rate
        elif name != AVERAGE and (found := results["metrics"].get(f"test/{task}/{measure}")) is not None:
            scores[name] = 100 * float(found)
    if AVERAGE in row.numbers and len(scores) == len(row.numbers) - 1:
        scores[AVERAGE] = statistics.fmean(scores.values())
    return scores


def _data_notes(versions: Mapping[str, Any]) -> list[str]:
    """Return notes on what a run recorded about its data: train rows, sources, test rows seen in training."""
    notes = []
    if "train_rows" in versions.get("split", {}):
        notes.append(f"{versions['split']['train_rows']} train rows")
    for split in ("train", "validation", "test"):
        for task, facts in versions.get(split, {}).items():
            if facts.get("note"):
                notes.append(f"{task}, {split}: {facts['note']}")
            if facts.get("overlap"):
                notes.append(
                    f"{task}: {facts['overlap']} test rows of {facts['rows']} occur in the train rows"
                )
    return notes


def _win_rate(folder: Path, notes: list[str]) -> float | None:
    """Return the win rate in percent from ``reft-judge``, if judge, reference and number of pairs are the paper's.

    If there are several files, the last by name counts, and a note says so.
    """
    found: dict[str, float] = {}
    for path in sorted((folder / "outputs").glob("reft_*win_rate.json")):
        result = read_json(path)
        judge, reference = str(result["judge"]), str(result["reference"])
        judged, unjudged = int(result["n_total"]), int(result["n_unjudged"])
        rate = f"{judge} against {reference} gives {result['win_rate']:.2f}"
        if (judge, reference) != (JUDGE, REFERENCE):
            notes.append(f"{rate}: not the paper's judge and reference")
        elif judged + unjudged != INSTRUCTIONS or unjudged > MOST_UNJUDGED:
            notes.append(f"{rate} on {judged} judged pairs, not AlpacaEval's {INSTRUCTIONS}")
        else:
            found[path.name] = float(result["win_rate"])
            if unjudged:
                notes.append(f"{rate} with {unjudged} of {INSTRUCTIONS} pairs unjudged")
    if len(found) > 1:
        said = ", ".join(f"{name} ({rate:.2f})" for name, rate in found.items())
        notes.append(f"{len(found)} files contain its win rate, the last one counts: {said}")
    return next(reversed(found.values()), None)


def composed(row: Printed) -> Config | None:
    """Compose the experiment with the paper's training file, without the settings of this machine."""
    # a machine's local settings would make a different experiment
    nothing_local = ["~local"] if (config_dir() / "local" / "default.yaml").is_file() else []
    try:
        return compose([f"experiment={row.experiment}", *row.overrides, *nothing_local])
    except CompositionError as error:
        log.warning("%s does not compose, so changed settings are unknown: %s", row.experiment, error)
        return None


def _changes(path: Path, expected: Config | None) -> tuple[str, ...]:
    """Return the differences of a run's configuration from the experiment, as overrides."""
    if expected is None or not path.is_file():
        return ("(settings unknown)",)
    found = differences(read_yaml(path), expected, seed=False)
    return tuple(
        f"{key}={json.dumps(mine) if isinstance(mine, bool | list | None) else mine}"
        for key, (mine, _) in found.items()
    )
