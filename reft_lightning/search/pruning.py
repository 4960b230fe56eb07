"""Successive halving: whether a trial goes on, from its validations and those of the other trials.

Everything that is needed lies in the trials' folders, so that a trial that runs again begins with nothing of its
first attempt. With one worker it is judged as it would have been then; of several workers, the others have gone on
meanwhile, and it is judged against more trials.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..storage.atomic import write_json
from .space import quiet_optuna

REPORTS_FILE = "reports.json"


class Reports:
    """The validations of one trial: step -> score, and the rungs that it has reached.

    Args:
        folder: of the trial.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / REPORTS_FILE
        self.values: dict[int, float] = {}
        self.rungs: dict[str, float] = {}

    @classmethod
    def read(cls, folder: Path) -> Reports:
        """Return the reports of a trial so far; none where it has not validated."""
        reports = cls(folder)
        if reports.path.is_file():
            stored = json.loads(reports.path.read_text(encoding="utf-8"))
            reports.values = {int(step): value for step, value in stored["values"].items()}
            reports.rungs = stored["rungs"]
        return reports

    def add(self, value: float) -> None:
        """Add the score of the next validation; validations count from 1."""
        self.values[len(self.values) + 1] = value

    def write(self) -> None:
        """Write the file."""
        write_json(self.path, {"values": self.values, "rungs": self.rungs})


def falls_behind(
    reports: Reports, others: Mapping[str, Reports], maximize: bool, settings: Mapping[str, int]
) -> bool:
    """Whether successive halving ends a trial after its last validation; notes the rungs that it reaches.

    A trial goes on from validation m, m e, m e^2, ... only among the best 1/e of those that got there before it
    (asynchronous: it waits for none; Li et al. 2020, arXiv:1810.05934).

    Args:
        reports: of the trial.
        others: of the other trials of its method.
        maximize: whether a higher score is better.
        settings: ``min_validations`` m and ``reduction_factor`` e.
    """
    optuna = quiet_optuna()
    pruner = optuna.pruners.SuccessiveHalvingPruner(
        min_resource=settings["min_validations"], reduction_factor=settings["reduction_factor"]
    )
    study = optuna.create_study(direction="maximize" if maximize else "minimize")
    study.add_trials([_trial(optuna, other) for other in others.values()])
    study.add_trial(_trial(optuna, reports))
    own = study.trials[-1]
    ends = pruner.prune(study, own)
    reports.rungs = dict(study.trials[-1].system_attrs)
    return ends


def _trial(optuna: Any, reports: Reports) -> Any:
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState.RUNNING,
        intermediate_values=reports.values,
        system_attrs=reports.rungs,
    )
