"""A study in a folder: its plan, one Optuna study per method in one storage, and its winners."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ..runs.results import has_scores, read_results
from ..runs.run_folder import last_checkpoint
from ..storage.atomic import write_text
from ..storage.reading import read_yaml
from ..suggest import needs_extra
from .budget import counted, spent
from .process import Lock
from .search_plan import Plan, parse_plan
from .space import Value
from .study_files import ERROR, JOURNAL, LOCKS, PLAN, WINNERS, read_job

HEARTBEAT = 20  # seconds; in a database, a trial that has missed three is lost
# In study.yaml in addition to the plan: the score that decides, max or min, the directory where runs start, the URL of
# a database (None for a journal in the folder), and the study's name in it, which precedes that of a method.
MORE = ("monitor", "mode", "directory", "storage", "study")
LOSS = "val/loss"  # of a trial: breaks ties between equal scores
FREE = 3  # this many trials in a row without cost, such as failures before the first batch, end a method


def load_optuna() -> Any:
    """Import Optuna with its log level set to ERROR; otherwise it logs every trial."""
    with needs_extra("search", "reft-search needs Optuna"):
        import optuna
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


@contextmanager
def experimental() -> Iterator[None]:
    """Suppress the warnings about Optuna's experimental features inside the block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", load_optuna().exceptions.ExperimentalWarning)
        yield


def open_storage(folder: Path, url: str | None) -> Any:
    """Return a study's Optuna storage: a journal in its folder, or a database, in which trials have a heartbeat.

    Raises:
        ValueError: for a database that cannot be reached, or whose driver is not installed.
    """
    storages = load_optuna().storages
    if url is None:
        lock: Any = Lock(folder / LOCKS / "journal")
        backend = storages.journal.JournalFileBackend(str(folder / JOURNAL), lock_obj=lock)
        return storages.JournalStorage(backend)
    # reopen a connection that the server has closed
    options: dict[str, Any] = {"pool_pre_ping": True}
    if url.startswith("sqlite"):
        options["connect_args"] = {"timeout": 60}
    shown = re.sub(r":[^:/@]*@", ":***@", url)
    with experimental():
        try:
            return storages.RDBStorage(
                url, engine_kwargs=options, heartbeat_interval=HEARTBEAT, grace_period=3 * HEARTBEAT,
                heartbeat_stale_trial_callback=run_again,
            )  # fmt: skip
        except ImportError as error:
            raise ValueError(
                f"storage={shown} needs the database's driver: {error}; for PostgreSQL: "
                'pip install "reft_lightning[postgresql]"'
            ) from error
        except Exception as error:  # SQLAlchemy and the driver may raise anything
            raise ValueError(f"cannot open storage={shown}: {str(error).splitlines()[0]}") from error


def run_again(study: Any, trial: Any) -> None:
    """Requeue a lost trial with the same parameters, from the start."""
    trial = copy.deepcopy(trial)
    trial.user_attrs = {}
    # drop the rungs of successive halving that the lost attempt had reached
    kept = {name: v for name, v in trial.system_attrs.items() if not name.startswith("completed_rung")}
    trial.system_attrs = kept
    with experimental():
        load_optuna().storages.RetryHeartbeatStaleTrialCallback()(study, trial)


def write_study(folder: Path, plan: Plan, **more: str | None) -> None:
    """Write ``study.yaml``: the plan and :data:`MORE`."""
    values = more | dataclasses.asdict(plan)
    write_text(folder / PLAN, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def read_study(folder: Path) -> tuple[Plan, dict[str, Any]]:
    """Return the plan of a study, and :data:`MORE`."""
    path = folder / PLAN
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a study: it has no {PLAN}; start one with reft-search search=NAME folder={folder}"
        )
    values = read_yaml(path)
    if missing := [key for key in ("name", *MORE) if key not in values]:
        raise ValueError(f"{path} is damaged: missing {', '.join(missing)}")
    more = {key: values.pop(key) for key in MORE}
    return parse_plan(values["name"], values, where=str(path)), more


class Study:
    """A study in a folder that holds ``study.yaml``."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder).resolve()
        self.plan, more = read_study(self.folder)
        self.monitor, self.maximize = more["monitor"], more["mode"] == "max"
        self.directory = Path(more["directory"])
        self.optuna = load_optuna()
        self.storage = open_storage(self.folder, more["storage"])
        self.turn = Lock(self.folder / LOCKS / "turn")
        pruner: Any = self.optuna.pruners.NopPruner()
        if self.plan.pruner == "successive_halving":
            # asynchronous: trials do not wait for each other (Li et al. 2020, arXiv:1810.05934); one of three continues
            pruner = self.optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
        self.studies: dict[str, Any] = {
            method: self.optuna.create_study(
                storage=self.storage, study_name=study_name(more["study"], method), pruner=pruner,
                direction="maximize" if self.maximize else "minimize", load_if_exists=True,
            )
            for method in self.plan.methods
        }  # fmt: skip

    def trials(self, method: str) -> list[Any]:
        """Return a method's trials from Optuna."""
        return self.studies[method].get_trials(deepcopy=False)

    def best(self, method: str) -> Any | None:
        """Return the trial with the best validation score, ties broken by loss; None if none is complete."""
        return best_of(self.trials(method), self.maximize)

    def start(self) -> None:
        """Record that the command was started: methods that gave up and winners that failed are tried again."""
        for study in self.studies.values():
            study.set_user_attr("started", datetime.datetime.now().isoformat())
        for error in self.folder.glob(f"{WINNERS}/*/*/{ERROR}"):
            error.unlink()

    def gave_up(self, method: str, trials: list[Any]) -> bool:
        """Return whether the latest trials since the command's start cost nothing, so the budget would never end it."""
        started = self.studies[method].user_attrs.get("started", "")
        times = [(t, t.datetime_complete) for t in counted(trials)]
        ended = [t for t, time in times if time and time.isoformat() >= started]
        return len(ended) >= FREE and not spent(ended[-FREE:])[self.plan.budget.unit]

    def has_room(self, method: str, trials: list[Any]) -> bool:
        """Return whether another trial of a method may start."""
        if spent(trials)[self.plan.budget.unit] >= self.plan.budget.amount or self.gave_up(method, trials):
            return False
        return self.plan.sampler != "grid" or len(counted(trials)) < self.plan.grid_size(method)

    def next_method(self) -> tuple[str | None, bool]:
        """Return the method of the next trial, which has spent the least, and whether any trial is running."""
        trials, unit = {method: self.trials(method) for method in self.plan.methods}, self.plan.budget.unit
        costs = {m: spent(found)[unit] for m, found in trials.items() if self.has_room(m, found)}
        running = any(trial.state.name == "RUNNING" for found in trials.values() for trial in found)
        return min(costs, key=costs.__getitem__, default=None), running

    def winners(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yield the folder and the job of each winner's run: the best trial's parameters with one seed of the plan."""
        for method in self.plan.methods:
            best = self.best(method)
            if best is None:
                continue
            for seed in self.plan.seeds:
                params = {d.name: best.params[d.name] for d in self.plan.space(method)}
                yield self.folder / WINNERS / method / f"seed_{seed}", {
                    "kind": "winner", "method": method, "number": best.number, "params": params, "seed": seed,
                    "edges": self.edges(method, params),
                    "overrides": self.plan.winner_overrides(method, params, seed),
                }  # fmt: skip

    def edges(self, method: str, params: Mapping[str, Value]) -> list[str]:
        """Return the edges of the search space that a winner is at; values beyond them were not tried."""
        found = [(d.edge(params[d.name]), d.name) for d in self.plan.space(method)]
        return [f"at the {edge} edge of {name}" for edge, name in found if edge]


def best_of(trials: Sequence[Any], maximize: bool) -> Any | None:
    """Return the complete Optuna trial with the best score, ties broken by loss; None if none is complete."""

    def order(trial: Any) -> tuple[float, float, int]:
        loss = trial.user_attrs.get(LOSS)
        return -trial.value if maximize else trial.value, math.inf if loss is None else loss, trial.number

    return min((trial for trial in trials if trial.state.name == "COMPLETE"), key=order, default=None)


def winner_status(folder: Path, job: Mapping[str, Any]) -> str:
    """Return ``complete``, ``failed`` or ``waiting``; waiting also if the folder holds an earlier winner's run."""
    if read_job(folder).get("overrides") != job["overrides"]:
        return "waiting"
    if (folder / ERROR).is_file():
        return "failed"
    return "complete" if read_results(folder).get("status") == "complete" else "waiting"


def was_tested(folder: Path, job: Mapping[str, Any]) -> bool:
    """Return whether a winner's run was stopped after its test: it resumes without reading test rows again."""
    same = read_job(folder).get("overrides") == job["overrides"]
    return has_scores(read_results(folder), "test/") and same and last_checkpoint(folder).is_file()


def study_name(study: str, method: str) -> str:
    """Return the name of a method's study in the storage, which may also contain other searches."""
    return f"{study}/{method}"
