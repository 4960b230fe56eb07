"""Read studies of ``reft-search``: trials, what they spent, and which parameters mattered.

Reading trials needs Optuna; the winners' runs are ordinary run folders.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..search.budget import counted, spent, verdict
from ..search.ledger import lost_reads, winner_folder
from ..search.study import best_of, experimental, open_storage, study_name
from ..search.study_files import JOURNAL, PLAN, SUMMARY
from ..search.summary import remarks_of
from ..storage.reading import read_json, read_yaml
from ..suggest import needs_extra
from .runs import Read

log = logging.getLogger(__name__)
ENOUGH = 30  # with fewer complete trials, importance is mostly noise


@dataclass
class Study:
    """A study: the trials of each method and what they spent."""

    folder: Path
    maximize: bool = True  # whether a higher score is better
    monitor: str = "score"  # the validation score that decides
    trials: dict[str, list[Any]] = field(default_factory=dict)  # method -> Optuna's trials, by number
    # method -> parameter -> share of the variance
    importance: dict[str, dict[str, float]] = field(default_factory=dict)
    spent: dict[str, dict[str, float]] = field(default_factory=dict)  # method -> unit -> amount
    # in words, with a verdict on whether the methods spent the same; empty if none is recorded
    budget: str = ""
    equal: bool = True  # whether they did; True while the search is running
    running: bool = False  # whether the search is unfinished, according to its summary
    # method -> remarks in its summary on its winner and on how its search ended
    remarks: dict[str, list[str]] = field(default_factory=dict)

    @property
    def measure(self) -> str:
        """Return the deciding measure, without split and task."""
        return self.monitor.rpartition("/")[2]

    def states(self, method: str) -> str:
        """Return how the trials of a method ended, such as ``12 complete, 3 pruned``."""
        counts = Counter(trial.state.name.lower() for trial in self.trials[method])
        return ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "none"

    def complete(self, method: str) -> list[Any]:
        """Return the trials with a score."""
        return [trial for trial in self.trials[method] if trial.state.name == "COMPLETE"]

    def best(self, method: str) -> Any | None:
        """Return the trial with the best score, ties broken by loss."""
        return best_of(self.trials[method], self.maximize)


def read_study(folder: Path) -> Study:
    """Read a study.

    Raises:
        ValueError: if its plan or its trials cannot be read, or Optuna is not installed.
    """
    plan = read_yaml(folder / PLAN)
    study = Study(folder, monitor=str(plan.get("monitor") or "validation score"))
    if plan.get("storage") or (folder / JOURNAL).is_file():
        _read_trials(study, plan)
    _add_summary(study)
    _add_budget(study, plan)
    return study


def _add_summary(study: Study) -> None:
    """Read what only the summary has: whether the search has ended, and remarks on winners and endings."""
    path = study.folder / SUMMARY
    summary: dict[str, Any] = {}
    try:
        summary = read_json(path) if path.is_file() else {}
    except ValueError as error:
        log.warning("%s", error)
    study.running = summary.get("status") != "complete"
    # a method may have spent nothing yet
    study.remarks = {name: remarks_of(method or {}) for name, method in summary.get("methods", {}).items()}


def _read_trials(study: Study, plan: Mapping[str, Any]) -> None:
    with needs_extra("search", f"reading the study {study.folder} needs Optuna"):
        import optuna
        from sqlalchemy.exc import SQLAlchemyError
    try:
        storage = open_storage(study.folder, plan.get("storage"))
        prefix = study_name(str(plan.get("study")), "")
        names = [name for name in optuna.get_all_study_names(storage) if name.startswith(prefix)]
        for name in names:
            kept, method = optuna.load_study(study_name=name, storage=storage), name.removeprefix(prefix)
            trials = kept.get_trials(deepcopy=False)
            study.maximize = kept.direction == optuna.study.StudyDirection.MAXIMIZE
            study.spent[method] = spent(trials)
            study.trials[method] = counted(trials)
            study.importance[method] = _importance(kept, study.complete(method))
    except (SQLAlchemyError, RuntimeError, ValueError, KeyError, ImportError) as error:
        raise ValueError(
            f"{plan.get('storage') or study.folder / JOURNAL} is not an Optuna storage: {str(error).splitlines()[0]}"
        ) from error


def _importance(kept: Any, complete: Sequence[Any]) -> dict[str, float]:
    """Return each parameter's share by PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255).

    Empty for few trials, whose shares are noise, and for a single parameter, whose share is always 1.
    """
    shared = set.intersection(*(set(trial.params) for trial in complete)) if complete else set()
    varied = [name for name in sorted(shared) if len({str(trial.params[name]) for trial in complete}) > 1]
    if len(complete) < ENOUGH or len(varied) < 2 or len({trial.value for trial in complete}) < 2:
        return {}
    import optuna

    with experimental():
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        shares = optuna.importance.get_param_importances(kept, evaluator=evaluator, params=varied)
    return {name: float(share) for name, share in shares.items()}


def _add_budget(study: Study, plan: Mapping[str, Any]) -> None:
    unit, amount = (plan.get("budget", {}).get(name) for name in ("unit", "amount"))
    if unit is None or not study.spent:
        study.budget = "still running" if study.running else ""
    elif study.running:
        each = ", ".join(f"{method} {cost[unit]:,.0f}" for method, cost in study.spent.items())
        study.budget = f"still running: spent {each} of {amount:,g} {unit} for each method"
    else:
        found = verdict(unit, amount, study.spent)
        study.equal = found.startswith("equal")
        study.budget = f"budget of each method: {amount:g} {unit}; spent: {found}"


def begun_anew(folder: Path, reads: Sequence[Read]) -> list[Read]:
    """Return the reads of winners that were restarted, which are in a study's ledger but not in its run folders."""
    found: list[Read] = []
    for line in lost_reads(folder):
        place, model = winner_folder(folder, line), line["model"]
        time, hash_ = str(line.get("time", "")), str(line.get("config_hash", ""))
        own = (read for read in reads if read.model == model and read.folder.resolve() == place.resolve())
        found += [replace(read, time=time) for read in {read.task: read for read in own}.values()] or [
            Read(place, hash_, line["seed"], hash_, line["method"], "?", 0, time, model)
        ]
    return found
