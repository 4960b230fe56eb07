"""Studies of `reft-search` as records: trials, what they spent, and which parameters mattered.

Optuna is needed to read `study.db`; the winners' runs are ordinary run folders and need nothing.
"""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from .comparisons import Comparison
from .runs import Read, ReportError

log = logging.getLogger(__name__)
DATABASE, PLAN, SUMMARY = "study.db", "study.yaml", "summary.json"
TRIALS, LEDGER = "trials", "test_reads.jsonl"
ENOUGH = 30  # complete trials, below which importance is that of noise


@dataclass(frozen=True)
class Trial:
    """One trial: its number, how it ended, its validation score and its parameters."""

    number: int
    state: str
    value: float | None
    params: Mapping[str, Any]


@dataclass
class Study:
    """A study: the trials of each method and what they spent.

    Args:
        folder: of the study.
        maximize: whether a higher score is better.
        monitor: the validation score that decides.
        trials: method -> trials by number.
        importance: method -> parameter -> share of the variance.
        spent: method -> unit -> amount.
        budget: in words, with the verdict whether the methods spent the same; empty where none is recorded.
        equal: whether they did, as far as the search has come to its end.
        running: whether the search has not come to its end, as its summary says.
        remarks: method -> what its summary says of its winner and of its end.
    """

    folder: Path
    maximize: bool = True
    monitor: str = "score"
    trials: dict[str, list[Trial]] = field(default_factory=dict)
    importance: dict[str, dict[str, float]] = field(default_factory=dict)
    spent: dict[str, dict[str, float]] = field(default_factory=dict)
    budget: str = ""
    equal: bool = True
    running: bool = False
    remarks: dict[str, list[str]] = field(default_factory=dict)

    @property
    def measure(self) -> str:
        """Return the measure that decides, without split and task."""
        return self.monitor.rpartition("/")[2]

    def states(self, method: str) -> str:
        """Return how the trials of a method ended: `12 complete, 3 pruned`."""
        counts = Counter(trial.state for trial in self.trials[method])
        return ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "none"

    def best(self, method: str) -> Trial | None:
        """Return the trial with the best score, the first of equals."""
        done = [
            trial for trial in self.trials[method] if trial.value is not None and trial.state == "complete"
        ]
        sign = -1 if self.maximize else 1
        return min(done, key=lambda trial: (sign * (trial.value or 0.0), trial.number), default=None)


def read_study(folder: Path) -> Study:
    """Read a study.

    Raises:
        ReportError: if the database cannot be read, or Optuna is not there.
    """
    study = Study(folder)
    plan = _plan(folder)
    study.monitor = str(plan.get("monitor") or "validation score")
    if (folder / DATABASE).is_file():
        _read_database(study)
    _add_summary(study)
    _add_budget(study, plan)
    return study


def _summary(folder: Path) -> dict[str, Any]:
    path = folder / SUMMARY
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        log.warning("%s cannot be read: %s", path, error)
        values = {}
    return values if isinstance(values, dict) else {}


def _methods(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    methods = summary.get("methods")
    found = methods.items() if isinstance(methods, dict) else ()
    return {str(name): method if isinstance(method, dict) else {} for name, method in found}


def _edges(method: Mapping[str, Any]) -> list[str]:
    best = method.get("best")
    edges = best.get("edges") if isinstance(best, dict) else None
    return list(map(str, edges)) if isinstance(edges, list) else []


def _add_summary(study: Study) -> None:
    """Take what the summary alone knows: whether the search has ended, and where its winners lie."""
    summary = _summary(study.folder)
    study.running = summary.get("status") != "complete"
    for name, method in _methods(summary).items():
        edges = _edges(method)
        said = [f"the winner lies {', '.join(edges)}: beyond, nothing was tried"] if edges else []
        if method.get("gave_up"):
            said.append(f"it ended before its budget: {method['gave_up']}")
        if said:
            study.remarks[name] = said


def mark_edges(comparisons: Sequence[Comparison]) -> None:
    """Mark the methods that are winners at an edge of their search space, wherever their studies lie."""
    methods = [method for comparison in comparisons for method in comparison.methods if not method.base]
    folders = {run.study for method in methods for run in method.runs if run.study is not None}
    summaries = {folder: _methods(_summary(folder)) for folder in sorted(folders)}
    for method in methods:
        won = [(run.study, run.method) for run in method.runs if run.study is not None]
        found = [edge for folder, name in won for edge in _edges(summaries[folder].get(name, {}))]
        method.edges = list(dict.fromkeys(found))


def _plan(folder: Path) -> dict[str, Any]:
    path = folder / PLAN
    if not path.is_file():
        return {}
    try:
        plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ReportError(f"{path} cannot be read: {error}") from error
    return plan if isinstance(plan, dict) else {}


def _read_database(study: Study) -> None:
    try:
        import optuna
        from sqlalchemy.exc import SQLAlchemyError
    except ModuleNotFoundError as error:
        raise ReportError(
            f"{study.folder} is a study, which takes Optuna to read ({error}): pip install 'reft_lightning[search]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{(study.folder / DATABASE).resolve()}")
        found = {name: optuna.load_study(study_name=name, storage=storage)
                 for name in sorted(s.study_name for s in storage.get_all_studies())}  # fmt: skip
        for name, kept in found.items():
            study.maximize = kept.direction == optuna.study.StudyDirection.MAXIMIZE
            study.trials[name] = [
                Trial(
                    t.number, t.state.name.lower(), t.value if t.state.name == "COMPLETE" else None, t.params
                )
                for t in kept.get_trials(deepcopy=False)
            ]
            study.importance[name] = _importance(kept, study.trials[name])
    except (SQLAlchemyError, RuntimeError) as error:
        raise ReportError(
            f"{study.folder / DATABASE} is no database of Optuna: {str(error).splitlines()[0]}"
        ) from error


def _importance(kept: Any, trials: Sequence[Trial]) -> dict[str, float]:
    """Return each parameter's share by PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255).

    Nothing of a few trials, whose shares come from noise, and nothing of a single parameter, whose share is always 1.
    """
    complete = [trial for trial in trials if trial.state == "complete"]
    shared = set.intersection(*(set(trial.params) for trial in complete)) if complete else set()
    varied = [name for name in sorted(shared) if len({str(trial.params[name]) for trial in complete}) > 1]
    if len(complete) < ENOUGH or len(varied) < 2 or len({trial.value for trial in complete}) < 2:
        return {}
    import warnings

    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        shares = optuna.importance.get_param_importances(kept, evaluator=evaluator, params=varied)
    return {name: float(share) for name, share in shares.items()}


def _add_budget(study: Study, plan: Mapping[str, Any]) -> None:
    from ..search.budget import behind_trials, total_cost, verdict

    for method in study.trials:
        spent = total_cost(study.folder / TRIALS / method)
        study.spent[method] = {"trials": float(len(study.trials[method])), **spent}
    budget = plan.get("budget") if isinstance(plan.get("budget"), dict) else {}
    unit, amount = budget.get("unit"), budget.get("amount")
    if unit is None or amount is None or not study.spent or any(unit not in s for s in study.spent.values()):
        study.budget = "still running" if study.running else ""
        return
    spent = {method: spent[unit] for method, spent in study.spent.items()}
    if study.running:
        each = ", ".join(f"{method} {value:,.0f}" for method, value in spent.items())
        study.budget = f"still running: spent {each} of {amount:,g} {unit} for each method"
        return
    said, behind = verdict(unit, amount, spent), behind_trials(unit, study.spent)
    study.equal = said == "equal"
    study.budget = f"budget of each method: {amount:g} {unit}; spent: {said}" + (
        f"; {behind}" if behind else ""
    )


def ledger_reads(folder: Path, reads: Sequence[Read]) -> list[Read]:
    """Return the reads that a study's ledger knows and its run folders do not: those of runs that were begun anew.

    Args:
        folder: of the study.
        reads: that run folders recorded.
    """
    path = folder / LEDGER
    if not path.is_file():
        return []
    lines: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    with path.open(encoding="utf-8") as file:  # lines end at \n alone
        for line in file:
            try:
                entry = json.loads(line)
                lines[str(entry["config_hash"]), str(entry["model"])].append(entry)
            except (ValueError, TypeError, KeyError):
                log.warning("%s: a line cannot be read: %.80s", path, line)
    found: list[Read] = []
    for (hash_, model), entries in lines.items():
        known = [read for read in reads if (read.hash, read.model) == (hash_, model)]
        events = max(Counter(read.task for read in known).values(), default=0)
        patterns = list({read.task: read for read in known}.values())
        for entry in entries[: len(entries) - events] if len(entries) > events else ():
            place, seed = Path(str(entry.get("folder", folder))), entry.get("seed")
            method = str(entry.get("method", ""))
            found += [replace(p, time=str(entry.get("time", ""))) for p in patterns] or [
                Read(place, hash_, seed, hash_, method, "?", 0, str(entry.get("time", "")), model)
            ]
    return found
