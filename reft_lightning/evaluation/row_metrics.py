"""Scores of rows, as pure functions and as torchmetrics classes that accumulate over batches and processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

Z = 1.959964  # quantile of the normal distribution for 95 % intervals


def pass_at_k(samples: int, passed: int, k: int) -> float:
    r"""Return the unbiased estimate of pass@k for one problem.

    .. math:: \text{pass@}k = 1 - \binom{n - c}{k} \Big/ \binom{n}{k}
        = 1 - \prod_{i = n - c + 1}^{n} \left(1 - \frac{k}{i}\right)

    for n samples of which c pass: the share of all subsets of k samples that contain at least one that passes. The
    product avoids large binomials. (1 - (1 - c/n)^k would be biased, because it can draw the same sample twice.)
    Source: Chen et al. 2021, arXiv:2107.03374, eq. 1.

    Args:
        samples: n.
        passed: c.
        k: size of the subsets.

    Raises:
        ValueError: unless 1 <= k <= n and 0 <= c <= n.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= the number of samples; got {samples} samples")
    if not 0 <= passed <= samples:
        raise ValueError(f"the number of passing samples must be in 0..{samples}; got {passed}")
    if samples - passed < k:  # every subset of k contains one that passes
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - passed + 1, samples + 1))


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    r"""Return the 95 % Wilson score interval of a proportion.

    .. math:: \frac{\hat p + z^2/2n \pm z \sqrt{\hat p (1 - \hat p)/n + z^2/4n^2}}{1 + z^2/n}

    Source: Wilson 1927, JASA 22(158). It stays within [0, 1] and is reliable for few rows.

    Args:
        correct: number of successes, 0..total.
        total: number of trials n.

    Returns:
        Lower and upper bound; (nan, nan) without trials.
    """
    if total == 0:
        return math.nan, math.nan
    p, shrink = correct / total, 1 + Z * Z / total
    centre = p + Z * Z / (2 * total)
    half = Z * math.sqrt(p * (1 - p) / total + Z * Z / (4 * total * total))
    low = (centre - half) / shrink if correct > 0 else 0.0
    high = (centre + half) / shrink if correct < total else 1.0
    return low, high


def mean_interval(total: int, sum_: float, squares: float) -> tuple[float, float]:
    r"""Return a 95 % interval of the mean of scores in [0, 1].

    This is Wilson's interval if every score is 0 or 1 (the sum of squares then equals the sum), otherwise the normal
    interval :math:`\bar x \pm z \, s / \sqrt n`, clipped to [0, 1].

    Args:
        total: number of scores n.
        sum_: sum of the scores.
        squares: sum of their squares.

    Returns:
        Lower and upper bound; (nan, nan) without scores.
    """
    if total == 0 or abs(sum_ - squares) < 1e-9 * total:
        return wilson_interval(round(sum_), total)
    mean = sum_ / total
    variance = max(squares / total - mean * mean, 0.0) * total / max(total - 1, 1)
    half = Z * math.sqrt(variance / total)
    return max(mean - half, 0.0), min(mean + half, 1.0)


def interval_of_means(means: list[float], intervals: list[tuple[float, float]]) -> tuple[float, float]:
    r"""Return a 95 % interval of the mean of independent means, such as the scores of several tasks.

    .. math:: \bar p - \tfrac1k \sqrt{\textstyle\sum_i (p_i - l_i)^2}, \qquad
              \bar p + \tfrac1k \sqrt{\textstyle\sum_i (u_i - p_i)^2}

    Source: Zou and Donner 2008, Statistics in Medicine 27(10), "recovery of variance estimates".

    Args:
        means: p_i of k tasks.
        intervals: (l_i, u_i), the 95 % interval of each.
    """
    k = len(means)
    centre = sum(means) / k
    below = math.sqrt(sum((p - low) ** 2 for p, (low, _) in zip(means, intervals, strict=True)))
    above = math.sqrt(sum((high - p) ** 2 for p, (_, high) in zip(means, intervals, strict=True)))
    return centre - below / k, centre + above / k


def mean_of_counts(counts: Sequence[Mapping[str, Any] | None]) -> tuple[float, float, float] | None:
    """Return the mean of the shares given by the counts of several tasks, with its interval.

    Returns:
        Mean, lower and upper bound; None if the score of a task is missing or is not a share of its rows.
    """
    known = [count for count in counts if count and "correct" in count]
    if len(known) < len(counts):
        return None
    shares = [count["correct"] / count["total"] for count in known]
    return sum(shares) / len(shares), *interval_of_means(shares, [count["interval"] for count in known])


class RowScores(Metric):
    """Sum scores in [0, 1] over rows, batches and processes; a row without an answer counts with its score of 0.

    ``compute()`` returns (4,) float32: sum, sum of squares, number of rows, and number of rows without an answer.
    Apple's GPUs have no wider floats; integers are exact up to 16 million.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", default=torch.zeros(4), dist_reduce_fx="sum")

    def update(self, scores: list[float], missing: int = 0) -> None:
        """Add the scores of a batch, and the number of its rows without an answer."""
        batch = [sum(scores), sum(score * score for score in scores), len(scores), missing]
        # not in place, because the tensor may have been created in inference mode
        self.sums = self.sums + torch.tensor(batch, dtype=torch.float32, device=self.sums.device)

    def compute(self) -> Tensor:
        """Return sum, sum of squares, rows, missing."""
        return self.sums

    def count(self) -> dict[str, Any]:
        """Return what a mean is computed from: ``correct`` (the sum), ``total``, ``missing`` and ``interval``."""
        sum_, squares, total, missing = self.compute().tolist()
        return {
            "correct": int(sum_) if sum_.is_integer() else sum_,
            "total": int(total),
            "missing": int(missing),
            "interval": list(mean_interval(int(total), sum_, squares)),
        }


class MeanLoss(Metric):
    """Mean loss over target tokens, independent of the batch size and the number of processes."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", default=torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("tokens", default=torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, loss: Tensor, tokens: int) -> None:
        """Add a batch's mean loss over a number of tokens."""
        self.total = self.total + loss.detach().float() * tokens
        self.tokens = self.tokens + tokens

    def compute(self) -> Tensor:
        """Return the mean; nan without tokens."""
        return self.total / self.tokens
