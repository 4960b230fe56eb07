"""Train and evaluate a reward model: a classifier with one output, which values the chosen answer of a pair more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.adapted import AdaptedModel
from ..data.example import Example
from ..data.pairs import rejected
from ..data.preferences import PAIR_ACCURACY
from ..evaluation.row_metrics import RowScores
from .module import FinetuningModule, TrainingPass
from .objectives import Objective
from .objectives.reward import rewards_of
from .optimization import Optimization


class RewardModule(FinetuningModule):
    """Train by an objective of rewards; evaluate by how often the chosen answer has the higher one.

    Logged are ``val/loss``, the mean over all pairs, and ``<stage>/<task>/pair_accuracy`` with its mean over tasks.
    Equal rewards count as wrong.

    Args:
        model: an :class:`~reft_lightning.adapters.adapted.AdaptedModel` whose base has one output for each text.
        val_tasks: names of the validation loaders, in their order.
        test_tasks: names of the test loaders, in their order.
        optimization: optimizer and schedule.
        objective: what is minimised.
        training_pass: see :class:`FinetuningModule`.
    """

    def __init__(
        self,
        model: AdaptedModel,
        val_tasks: Sequence[str],
        test_tasks: Sequence[str],
        optimization: Optimization,
        objective: Objective,
        training_pass: TrainingPass | None = None,
    ) -> None:
        super().__init__(model, val_tasks, test_tasks, optimization, training_pass)
        self.objective, self.kind, self.commonest = objective, {"kind": "preference"}, {}
        self.scores: Any = nn.ModuleList(RowScores() for _ in dict.fromkeys((*val_tasks, *test_tasks)))
        self.places = {task: i for i, task in enumerate(dict.fromkeys((*val_tasks, *test_tasks)))}

    def loss_of(self, batch: dict[str, Any]) -> Tensor:
        """Return the loss of the objective."""
        return self.objective.loss(self, batch)

    def validation_step(self, batch: dict[str, Any], batch_index: int, dataloader_idx: int = 0) -> None:
        """Add the loss of a batch of validation pairs, and rank them."""
        margins = self._rank(batch, self.tasks["val"][dataloader_idx])
        self.loss.update(-F.logsigmoid(margins).mean(), len(margins))

    def test_step(self, batch: dict[str, Any], batch_index: int, dataloader_idx: int = 0) -> None:
        """Rank a batch of test pairs."""
        self._rank(batch, self.tasks["test"][dataloader_idx])

    def _rank(self, batch: dict[str, Any], task: str) -> Tensor:  # -> (b,)
        rewards = rewards_of(self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]))
        chosen, others = rewards.chunk(2)
        margins = chosen - others
        examples: list[Example] = batch["examples"]
        for example, pair in zip(examples, zip(chosen.tolist(), others.tolist(), strict=True), strict=True):
            right, other = pair[0] > pair[1], rejected(example).target
            self.predictions.append(
                {
                    "task": task, "source": example.source, "prompt": example.prompt,
                    "answer": example.target if right else other, "gold": example.target, "rejected": other,
                    "rewards": [round(reward, 4) for reward in pair], "correct": right,
                    "scores": {PAIR_ACCURACY: float(right)},
                }
            )  # fmt: skip
        self.scores[self.places[task]].update((margins > 0).double().tolist())
        return margins

    def _forget(self) -> None:
        super()._forget()
        for metric in self.scores:
            metric.reset()
            metric.update([])

    def on_validation_epoch_end(self) -> None:
        """Log the loss, a mean over all pairs, and the accuracy."""
        self.log(f"{self.prefix}val/loss", self.loss.compute(), sync_dist=True)
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log the accuracy."""
        self._log_scores("test")

    def _log_scores(self, stage: str) -> None:
        self.counts, means = {}, []
        for task in self.tasks[stage]:
            count = self.scores[self.places[task]].count()
            if count["total"]:
                name = f"{self.prefix}{stage}/{task}/{PAIR_ACCURACY}"
                self.counts[name] = count
                means.append(count["correct"] / count["total"])
                self.log(name, means[-1], sync_dist=True)
        if means:
            name = f"{self.prefix}{stage}/{PAIR_ACCURACY}"
            self.log(name, sum(means) / len(means), prog_bar=True, sync_dist=True)
