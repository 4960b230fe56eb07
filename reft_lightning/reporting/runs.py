"""Find and read run folders, and say why one is left out."""

from __future__ import annotations

import csv
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from ..config.identity import flat, identity, used_settings
from ..config.schema import Config
from ..search.study_files import LOCKS, PLAN, TRIALS, WORKERS, read_job
from ..storage.predictions import Key, read_predictions
from ..storage.reading import read_json, read_yaml
from ..terminal.bars import Bar

RUN_FOLDER = "a run folder is what reft-train writes: config.yaml, results.json, predictions/, adapter/"
INSIDE = {"evaluations", "checkpoints", "predictions", "adapter", "wandb"}  # subfolders of a run folder
NEEDED = {"metrics": dict, "seed": int, "method": str, "model": str, "data_versions": dict}  # in results.json
WORDS = {dict: "an object", int: "an integer", str: "a string"}
ALL = "all"  # the task of a loss over the rows of all tasks


# task -> (source, number of earlier occurrences) -> row, sorted by key
Predictions = dict[str, dict[tuple[str, int], Mapping[str, Any]]]


@dataclass(frozen=True)
class LeftOut:
    """A folder that is not a usable run, and why."""

    folder: Path
    reason: str


@dataclass(frozen=True)
class Read:
    """One read of a test split."""

    folder: Path
    configuration: str  # of the run that read it, without the seed
    seed: int | None
    hash: str
    method: str
    task: str
    rows: int
    time: str
    model: str  # adapted | base


@dataclass(frozen=True, eq=False)
class Run:
    """One complete run."""

    folder: Path
    config: Mapping[str, Any]  # dotted key -> value; keys added after the run have their defaults
    results: Mapping[str, Any]  # the contents of `results.json`
    _parsed: dict[Path, Predictions] = field(default_factory=dict, init=False, repr=False)

    @property
    def seed(self) -> int:
        """Return the seed of training."""
        return int(self.results["seed"])

    @cached_property
    def method(self) -> str:
        """Return the name of the method: for a winner the one in its study, else the intervention's."""
        return str(self.winner.get("method", self.results.get("method", "")))

    @cached_property
    def winner(self) -> Mapping[str, Any]:
        """Return what a search recorded about its winner, such as ``method`` and ``edges``; empty for other runs."""
        job = read_job(self.folder)
        return job if job.get("kind") == "winner" else {}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Return what identifies the method: what identifies the run, except its seed."""
        return identity(self.config, seed=False)

    @property
    def used_settings(self) -> dict[str, Any]:
        """Return the settings without intervention settings that do not apply to the method."""
        return used_settings(self.settings)

    @property
    def configuration(self) -> str:
        """Return the settings as one string: equal strings mean one method. A hash replaces settings that are lost."""
        if not self.config:
            return str(self.results.get("config_hash", ""))
        return json.dumps(self.settings, sort_keys=True, default=str)

    @cached_property
    def adapter_bytes(self) -> int | None:
        """Return the size of the saved adapter; None if nothing is saved."""
        files = list((self.folder / "adapter").rglob("*.safetensors"))  # peft's are in a subfolder
        return sum(file.stat().st_size for file in files) if files else None

    def metrics(self, split: str, base: bool = False) -> dict[str, float]:
        """Return name -> value for a split (``test`` or ``validation``); names are ``task/measure``, or a measure."""
        prefix = ("base/" if base else "") + ("test/" if split == "test" else "val/")
        return {
            # JSON without NaN writes null
            name.removeprefix(prefix): float(value) if isinstance(value, int | float) else math.nan
            for name, value in self.results["metrics"].items() if name.startswith(prefix)
        }  # fmt: skip

    def scores(self, split: str, base: bool = False) -> dict[str, dict[str, float]]:
        """Return task -> measure -> value for a split (``test`` or ``validation``)."""
        found: dict[str, dict[str, float]] = {}
        for name, value in self.metrics(split, base).items():
            task, _, measure = name.rpartition("/")
            if task:
                found.setdefault(task, {})[measure] = value
        return found

    def task(self, name: str) -> Mapping[str, Any]:
        """Return what the run recorded about a task: the ``kind`` of its predictions, and the ``labels`` of classes."""
        return (self.results.get("tasks") or {}).get(name, {})

    def rows(self, split: str, task: str, base: bool = False) -> Mapping[tuple[str, int], Mapping[str, Any]]:
        """Return the rows of a task; for :data:`ALL`, the texts of every task, reassembled from their pieces."""
        path = self.folder / "predictions" / f"{'base' if base else 'reft'}_{split}.jsonl"
        if path not in self._parsed:
            self._parsed[path] = _by_task(read_predictions(path))
        found = self._parsed[path]
        if task == ALL and ALL not in found:
            found[ALL] = _texts(found)
        return found.get(task, {})

    def curve(self, column: str) -> list[tuple[int, float]]:
        """Return (step, value) of one column of the CSV logs, from all parts of a resumed run.

        Steps are as logged: from 0 during training, and the total number of steps for evaluations after training.
        """
        points: dict[int, float] = {}
        parts = self.folder.glob("csv*/metrics.csv")
        for part in sorted(parts, key=lambda path: (len(path.parent.name), path)):  # csv, csv_2, ... csv_10
            with part.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    if row.get(column) and row.get("step"):
                        points[int(row["step"])] = float(row[column])
        return sorted(points.items())

    def learning_curve(self, column: str) -> list[tuple[int, float]]:
        """Return (optimizer steps done, value) for what was logged during training.

        The validation after training is left out: it repeats that of the last step, or of the restored checkpoint,
        which belongs to an earlier step.
        """
        steps = self.results.get("steps")
        return [(step + 1, value) for step, value in self.curve(column) if steps is None or step < steps]


def find_folders(roots: Iterable[Path]) -> tuple[list[Path], list[Path], list[LeftOut]]:
    """Return the run folders and the studies below some folders, each once, and the folders that contain neither.

    The trials of a study are left out: they were compared by validation, within the search.
    """
    runs: dict[Path, Path] = {}
    studies: dict[Path, Path] = {}
    left: list[LeftOut] = []
    for root in roots:
        if not root.is_dir():
            raise ValueError(f"{root}: no such folder; {RUN_FOLDER}")
        something = False
        for parent, folders, files in os.walk(root):
            path = Path(parent)
            if PLAN in files:
                something = True
                studies.setdefault(path.resolve(), path)
                folders[:] = sorted(f for f in folders if f not in (TRIALS, LOCKS, WORKERS))
            elif {"results.json", "config.yaml"} & set(files) or ".hydra" in folders:
                something = True
                folders.clear()
                runs.setdefault(path.resolve(), path)
            else:
                folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in INSIDE)
        if not something:
            left.append(LeftOut(root, "contains no run folder"))
    return list(runs.values()), list(studies.values()), left


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[LeftOut], list[Read]]:
    """Return the complete runs, what is left out, and every recorded read of a test split, also by stopped runs."""
    runs: list[Run] = []
    left: list[LeftOut] = []
    reads: list[Read] = []
    first: dict[tuple[str, ...], Path] = {}  # a run, or a read -> the first folder that contains it
    with Bar("reading runs", len(folders)) as bar:
        for folder in folders:
            try:
                if not (folder / "results.json").is_file():
                    raise ValueError("no results.json: the run ended before training started")
                results = read_json(folder / "results.json")
                config, problem = _read_config(folder)
                run = Run(folder, config, results)
                began = str(results.get("run_dir", folder))  # the same in a copy
                reads += [
                    read for read in _reads(run)
                    if first.setdefault((began, read.time, read.hash, read.task, read.model), folder) == folder
                ]  # fmt: skip
                # only evaluations have a split
                ended = str(results.get("finished")), str(results.get("split"))
                if (other := first.setdefault((began, *ended), folder)) != folder:
                    problem = f"it contains the same run as {other}: one of them is a copy"
                problem = _problem(run) or problem
            except (ValueError, OSError) as error:
                problem = str(error)
            if problem:
                left.append(LeftOut(folder, problem))
            else:
                runs.append(run)
            bar.advance()
    return runs, left, reads


def _read_config(folder: Path) -> tuple[dict[str, Any], str | None]:
    """Return the settings, with defaults for missing ones; or no settings, and why."""
    path = folder / "config.yaml"
    if not path.is_file():
        return {}, "no config.yaml"
    try:
        return _defaults() | flat(read_yaml(path)), None
    except (ValueError, OSError) as error:
        return {}, str(error)


@cache
def _defaults() -> dict[str, Any]:
    return flat(asdict(Config()))


def _problem(run: Run) -> str | None:
    """Return why the results of a run cannot be compared; None if they can."""
    status = run.results.get("status")
    if status != "complete":
        error = f" ({run.results['error']})" if run.results.get("error") else ""
        return f"its status is {str(status).partition(':')[0]!r}, not 'complete'{error}"
    missing = [name for name in NEEDED if run.results.get(name) is None]
    if missing:
        return f"results.json has no {', '.join(missing)}"
    wrong = [
        f"{name} must be {WORDS[kind]}"
        for name, kind in NEEDED.items()
        if not isinstance(run.results[name], kind)
    ]
    return f"results.json: {', '.join(wrong)}" if wrong else None


def _by_task(rows: Mapping[Key, Mapping[str, Any]]) -> Predictions:
    found: Predictions = defaultdict(dict)
    for task, source, number in sorted(rows):
        found[task][source, number] = rows[task, source, number]
    return dict(found)


def _texts(found: Predictions) -> dict[tuple[str, int], Mapping[str, Any]]:
    pieces: dict[tuple[str, int], list[Mapping[str, Any]]] = defaultdict(list)
    for number, of_task in enumerate(found.values()):
        for (source, _), row in of_task.items():
            pieces[source, number].append(row)
    return {key: _whole(of_text) for key, of_text in pieces.items()}


def _whole(pieces: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the row of a text from the rows of its pieces; without a score if a piece has no loss."""
    losses = [piece.get("scores", {}).get("loss") for piece in pieces]
    if not all(isinstance(loss, int | float) for loss in losses):
        return {}
    tokens = [piece["target_tokens"] for piece in pieces]
    total = sum(loss * count for loss, count in zip(losses, tokens, strict=True))
    return {"scores": {"loss": total / sum(tokens)}, "target_tokens": sum(tokens)}


def _reads(run: Run) -> list[Read]:
    results = run.results
    return [
        Read(
            folder=run.folder, configuration=run.configuration, seed=results.get("seed"),
            hash=str(read.get("config_hash") or results.get("config_hash", "")),
            method=run.method, task=str(read.get("task", "")), rows=int(read.get("rows") or 0),
            time=str(read.get("time", "")), model=str(read.get("model", "adapted")),
        )
        for read in results.get("test_reads") or [] if isinstance(read, dict)
    ]  # fmt: skip


def repeated(reads: Sequence[Read]) -> set[int]:
    """Return the indices of reads of a test split that the same configuration and seed had read before.

    The same hash means the same configuration, and so do the same settings, whatever the file locations and logging.
    """
    seen: set[tuple[Any, ...]] = set()
    again: set[int] = set()
    for i, read in enumerate(reads):
        keys = {(read.configuration, read.seed, read.task, read.model), (read.hash, read.task, read.model)}
        if keys & seen:
            again.add(i)
        seen |= keys
    return again
