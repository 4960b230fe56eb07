"""Train and evaluate a reward model: a classifier with one output, higher for the chosen answer of a pair."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..adapters.adapted import AdaptedModel
from ..data.benchmark_data import BenchmarkData
from ..data.example import Example
from ..data.pairs import rejected
from ..data.preferences import PAIR_ACCURACY
from .module import TrainingPass
from .objectives import Objective
from .objectives.reward import rewards_of
from .optimization import Optimization
from .scored_rows import ScoredRowsModule


class RewardModule(ScoredRowsModule):
    """Train with an objective on rewards; evaluate how often the chosen answer has the higher reward.

    It logs ``val/loss``, the mean over all pairs, and ``<stage>/<task>/pair_accuracy`` with its mean over tasks. Ties
    count as wrong.

    Args:
        model: an :class:`~reft_lightning.adapters.adapted.AdaptedModel` whose base has one output per text.
        data: see :class:`FinetuningModule`.
        optimization: optimizer and schedule.
        objective: the objective to minimise.
        training_pass: see :class:`FinetuningModule`.
    """

    def __init__(
        self,
        model: AdaptedModel,
        data: BenchmarkData,
        optimization: Optimization,
        objective: Objective,
        training_pass: TrainingPass | None = None,
    ) -> None:
        super().__init__(model, data, optimization, objective, (PAIR_ACCURACY,), training_pass)
        self.kind, self.commonest = {"kind": "preference"}, {}

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
        broken = self.without_numbers(margins[:, None])
        self._metric(PAIR_ACCURACY, task).update((margins > 0).double().tolist(), int(broken.sum()))
        return margins
