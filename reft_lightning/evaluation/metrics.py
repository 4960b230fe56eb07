"""Scores as pure functions, and as torchmetrics classes on top that sum over batches and processes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric


def wilson_interval(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    r"""Return the Wilson score interval of a proportion (95 % for the default z).

    .. math:: \frac{\hat p + z^2/2n \pm z \sqrt{\hat p (1 - \hat p)/n + z^2/4n^2}}{1 + z^2/n}

    Source: Wilson 1927, JASA 22(158). It stays inside [0, 1] and is sound for few rows.

    Args:
        correct: successes, 0..total.
        total: trials n.
        z: quantile of the normal distribution, 1.96 for 95 %.

    Returns:
        Lower and upper end; (nan, nan) without trials.
    """
    if total == 0:
        return math.nan, math.nan
    p, shrink = correct / total, 1 + z * z / total
    centre = p + z * z / (2 * total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    low = (centre - half) / shrink if correct > 0 else 0.0
    high = (centre + half) / shrink if correct < total else 1.0
    return low, high


class ExactMatch(Metric):
    """Count rows whose answer equals the gold answer; a row without an answer counts as wrong.

    ``compute()`` returns (3,) int64: correct, total and missing (rows where no answer was found), summed over
    processes.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", default=torch.zeros(3, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, answers: list[str | None], gold: list[str]) -> None:
        """Count a batch."""
        correct = sum(a == g for a, g in zip(answers, gold, strict=True))
        missing = sum(a is None for a in answers)
        batch = torch.tensor([correct, len(gold), missing], device=self.counts.device)
        self.counts = self.counts + batch  # not in place: inference mode may have made it

    def compute(self) -> Tensor:
        """Return correct, total, missing."""
        return self.counts


class MeanLoss(Metric):
    """Mean loss over target tokens: the same for any batch size and any number of processes."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", default=torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("tokens", default=torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, loss: Tensor, tokens: int) -> None:
        """Add a batch's mean loss over so many tokens."""
        self.total = self.total + loss.detach().float() * tokens
        self.tokens = self.tokens + tokens

    def compute(self) -> Tensor:
        """Return the mean; nan without tokens."""
        return self.total / self.tokens
