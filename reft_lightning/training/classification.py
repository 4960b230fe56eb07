"""Train and evaluate a classifier: its loss, and the measures of its task."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.adapted import AdaptedModel
from ..data.classification_data import ClassificationData
from ..data.labelled import LabelledText
from ..evaluation.classifier_metrics import interval_of, metric_of
from ..evaluation.row_metrics import RowScores
from .module import FinetuningModule, TrainingPass
from .objectives.base import penalty_of
from .optimization import Optimization

COMBINED = "combined_score"


class ClassificationModule(FinetuningModule):
    r"""Train with cross entropy over the classes, or with squared error if a score is predicted.

    .. math:: -\log \operatorname{softmax}(z)_y \qquad \text{or} \qquad (z - y)^2

    The loss is computed in float32 from float32 labels, whatever the dtype of the base and its head. (The authors'
    code casts the labels of STS-B to bfloat16, which keeps only 3 digits of its scores.)

    It logs ``val/loss``, ``<stage>/<test set>/<measure>``, and ``<stage>/<measure>`` for the task itself, without its
    further test sets. Accuracy is accompanied by ``majority_accuracy``, the accuracy of always predicting the most
    common class of the train rows, a baseline that a model must beat to show that it reads the text.
    ``combined_score`` is the mean of the task's other measures.

    If the outputs for a row are NaN, it counts as wrong: its prediction is the class after the correct one.

    Intervals in ``counts`` use Wilson's method for accuracy, Fisher's z for correlations and the delta method for F1.

    Args:
        model: an :class:`~reft_lightning.adapters.adapted.AdaptedModel` whose base is a sequence classifier.
        data: provides the task, its measures and the train rows.
        optimization: optimizer and schedule.
        training_pass: see :class:`FinetuningModule`.
        class_order: the classifier output for each class of the task; None if they are in the task's order.
    """

    def __init__(
        self,
        model: AdaptedModel,
        data: ClassificationData,
        optimization: Optimization,
        training_pass: TrainingPass | None = None,
        class_order: list[int] | None = None,
    ) -> None:
        super().__init__(model, data, optimization, training_pass)
        self.class_order, self.task, self.measures = class_order, data.task, data.task.measures
        labels = {"kind": "classification", "labels": list(self.task.labels)}
        self.kind = {"kind": "regression"} if self.task.regression else labels
        names = dict.fromkeys((*data.val_tasks, *data.test_tasks))
        answers = Counter(example.answer for example in data.train_rows.examples)
        answer = "" if self.task.regression else answers.most_common(1)[0][0]
        self.commonest = {name: answer for name in names if answer}
        self.scores: Any = nn.ModuleDict({name: self._metrics_of_task() for name in names})

    def _metrics_of_task(self) -> nn.ModuleDict:
        metrics = nn.ModuleDict()
        for measure in self.measures:
            if measure != COMBINED:
                rows = measure == "accuracy"
                metrics[measure] = RowScores() if rows else metric_of(measure, self.task.num_labels)
        if "accuracy" in metrics:
            metrics["majority_accuracy"] = RowScores()
        return metrics

    def logits_of(self, batch: dict[str, Any]) -> Tensor:  # (b, classes) or (b,) float32
        """Return the classifier's outputs, in the order of the task's classes."""
        return self._logits(self._output(batch))

    def _output(self, batch: dict[str, Any]) -> Any:
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "examples", "rows")}
        return self.output_of(inputs, batch)

    def _logits(self, output: Any) -> Tensor:
        logits = output.logits.float()
        if self.task.regression:
            return logits.squeeze(-1)
        return logits if self.class_order is None else logits[:, self.class_order]

    def loss_of(self, batch: dict[str, Any]) -> Tensor:
        """Return the mean loss over the rows, including penalties of interventions."""
        output = self._output(batch)
        return self._loss(self._logits(output), batch["labels"]) + penalty_of(self, output)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.task.regression:
            return F.mse_loss(logits, labels.float())
        return F.cross_entropy(logits, labels)

    # --- one batch ------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], batch_index: int, dataloader_idx: int = 0) -> None:
        """Add the loss of a batch of validation rows, and score it."""
        logits = self.logits_of(batch)
        self.loss.update(self._loss(logits, batch["labels"]), len(logits))
        self._score(logits, batch, self.tasks["val"][dataloader_idx])

    def test_step(self, batch: dict[str, Any], batch_index: int, dataloader_idx: int = 0) -> None:
        """Score a batch of test rows."""
        self._score(self.logits_of(batch), batch, self.tasks["test"][dataloader_idx])

    def _score(self, logits: Tensor, batch: dict[str, Any], task: str) -> None:
        examples: list[LabelledText] = batch["examples"]
        labels = batch["labels"]
        broken = self.without_numbers(logits if logits.ndim == 2 else logits[:, None])
        if self.task.regression:
            predicted = logits
        else:
            predicted = logits.argmax(-1).where(~broken, (labels + 1) % self.task.num_labels)
        for measure, metric in self.scores[task].items():
            if measure == "accuracy":
                metric.update((predicted == labels).double().tolist(), int(broken.sum()))
            elif measure == "majority_accuracy":
                metric.update([float(example.answer == self.commonest[task]) for example in examples])
            else:
                metric.update(predicted, labels)
        rows = zip(examples, predicted.tolist(), logits.tolist(), broken.tolist(), strict=True)
        for example, guess, row, lost in rows:
            record: dict[str, Any] = {"task": task, "source": example.source, "prompt": example.prompt}
            if self.task.regression:
                record |= {
                    "answer": f"{guess:.4f}",
                    "gold": example.answer,
                    "error": abs(guess - example.label),
                    "value": guess,
                }
            else:
                answer = None if lost else self.task.labels[guess]
                record |= {"answer": answer, "gold": example.answer, "correct": guess == example.label}
                record |= {"logits": [round(value, 4) for value in row]}
                if "accuracy" in self.measures:
                    record["scores"] = {"accuracy": float(guess == example.label)}
            self.predictions.append(record)

    # --- a whole split --------------------------------------------------------------------------------------

    def _forget(self) -> None:
        super()._forget()
        for metric in (metric for metrics in self.scores.values() for metric in metrics.values()):
            metric.reset()

    def _log_scores(self, stage: str) -> None:
        self.counts = {}
        for task in self.tasks[stage]:
            values = self._values(task, f"{self.prefix}{stage}/{task}")
            for measure, value in values.items():
                self.log(f"{self.prefix}{stage}/{task}/{measure}", value, sync_dist=True)
                if task == self.task.name:
                    main = measure == self.measures[0]
                    self.log(f"{self.prefix}{stage}/{measure}", value, prog_bar=main, sync_dist=True)

    def _values(self, task: str, path: str) -> dict[str, float]:
        """Return the measures of one test set, and record the counts they are based on."""
        values: dict[str, float] = {}
        read = torch.tensor(sum(row["task"] == task for row in self.predictions), device=self.device)
        total = int(self.trainer.strategy.reduce(read, reduce_op="sum"))  # by all processes
        for measure, metric in self.scores[task].items():
            if isinstance(metric, RowScores):
                count = metric.count()
                values[measure] = count["correct"] / count["total"]
            else:
                values[measure] = float(metric.compute())
                interval = interval_of(measure, metric, values[measure], total)
                count = {"total": total, "interval": list(interval)}
            self.counts[f"{path}/{measure}"] = count
        if COMBINED in self.measures:
            others = [values[measure] for measure in self.measures if measure != COMBINED]
            values[COMBINED] = sum(others) / len(others)
        return values
