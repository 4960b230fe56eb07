"""Train with an objective, and evaluate by scores that are means over rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ..adapters.adapted import AdaptedModel
from ..data.benchmark_data import BenchmarkData
from ..evaluation.row_metrics import RowScores
from .module import FinetuningModule, TrainingPass
from .objectives import Objective
from .optimization import Optimization


class ScoredRowsModule(FinetuningModule):
    """Log ``<stage>/<task>/<measure>``, and ``<stage>/<measure>``, the mean over tasks as in the paper.

    Training minimises the objective. All tasks have the given measures; the progress bar shows the first of them.

    Attributes:
        scores: measure -> task -> sum over rows.
    """

    def __init__(
        self,
        model: AdaptedModel,
        data: BenchmarkData,
        optimization: Optimization,
        objective: Objective,
        measures: Sequence[str],
        training_pass: TrainingPass | None = None,
    ) -> None:
        super().__init__(model, data, optimization, training_pass)
        self.objective, self.main = objective, next(iter(measures), None)
        self.scores: Any = nn.ModuleDict()
        for measure in measures:
            self._add_measure(measure, (*data.val_tasks, *data.test_tasks))

    def loss_of(self, batch: dict[str, Any]) -> Tensor:
        """Return the objective's loss."""
        return self.objective.loss(self, batch)

    def _add_measure(self, measure: str, tasks: Iterable[str]) -> None:
        self.scores[measure] = nn.ModuleDict({_key(task): RowScores() for task in tasks})

    def _metric(self, measure: str, task: str) -> RowScores:
        return self.scores[measure][_key(task)]

    def _forget(self) -> None:
        super()._forget()
        for metric in (metric for by_task in self.scores.values() for metric in by_task.values()):
            metric.reset()
            metric.update([])

    def _log_scores(self, stage: str) -> None:
        self.counts = {}
        for measure, by_task in self.scores.items():
            means = []
            for task in (task for task in self.tasks[stage] if _key(task) in by_task):
                count = by_task[_key(task)].count()
                if count["total"]:
                    name = f"{self.prefix}{stage}/{task}/{measure}"
                    self.counts[name] = count
                    means.append(count["correct"] / count["total"])
                    self.log(name, means[-1], sync_dist=True)
            if means:
                name = f"{self.prefix}{stage}/{measure}"
                self.log(name, sum(means) / len(means), prog_bar=measure == self.main, sync_dist=True)


def _key(task: str) -> str:
    return task.replace(".", "_")  # module names must not contain dots
