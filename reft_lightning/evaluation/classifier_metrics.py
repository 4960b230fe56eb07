"""Classifier measures that are not means over rows: correlations and F1 as torchmetrics classes, with 95 % intervals.

Accuracy is `row_metrics.RowScores` with Wilson's interval.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import BinaryF1Score, MulticlassConfusionMatrix
from torchmetrics.utilities.data import dim_zero_cat

from .row_metrics import Z

log = logging.getLogger(__name__)


def matthews(confusion: Tensor) -> float:  # (classes, classes), rows are labels
    r"""Return Matthews' correlation for a confusion matrix C; 0 if it is undefined.

    .. math:: \frac{c s - \sum_k p_k t_k}{\sqrt{(s^2 - \sum_k p_k^2)(s^2 - \sum_k t_k^2)}}

    with c the trace of C, s its sum, t and p its row and column sums.

    Source: Gorodkin 2004, Computational Biology and Chemistry 28. It is undefined if all predictions, or all labels,
    are of one class, and is then 0 by convention, as in scikit-learn and GLUE's metric. (For two classes, torchmetrics
    uses a limit instead, which rewards always predicting the most common class.)

    >>> matthews(torch.tensor([[0, 3], [0, 7]]))
    0.0
    """
    counts = confusion.cpu().double()  # not every accelerator has float64
    total, right = counts.sum(), counts.trace()
    predicted, true = counts.sum(0), counts.sum(1)
    spread = (total**2 - (predicted**2).sum()) * (total**2 - (true**2).sum())
    if spread <= 0:
        return 0.0
    return float((right * total - predicted @ true) / spread.sqrt())


class Matthews(MulticlassConfusionMatrix):
    """Matthews' correlation, accumulated over batches and processes, see `matthews`."""

    def compute(self) -> Tensor:
        """Return the correlation."""
        return torch.tensor(matthews(super().compute()))


class Correlation(Metric):
    """Pearson's correlation of predicted and true scores over batches and processes, or Spearman's, that of ranks.

    It is computed in float64 from all scores. (torchmetrics accumulates Pearson's in float32, so constant predictions
    get a correlation that consists of rounding errors.) It is 0 if either side is constant, where the correlation is
    undefined, and NaN if any prediction is NaN.
    """

    full_state_update = False
    said: list[Tensor]
    gold: list[Tensor]

    def __init__(self, ranks: bool) -> None:
        super().__init__()
        self.ranks = ranks
        self.add_state("said", default=[], dist_reduce_fx="cat")
        self.add_state("gold", default=[], dist_reduce_fx="cat")

    def update(self, said: Tensor, gold: Tensor) -> None:  # (b,), (b,)
        """Add the scores of a batch."""
        self.said.append(said.float())
        self.gold.append(gold.float())

    def compute(self) -> Tensor:
        """Return the correlation."""
        both = [dim_zero_cat(scores).cpu().double() for scores in (self.said, self.gold)]
        if any(scores.isnan().any() for scores in both):
            return torch.tensor(math.nan)
        if any(scores.min() == scores.max() for scores in both):
            log.warning(
                "a correlation is undefined, because predictions or labels are constant; it counts as 0"
            )
            return torch.tensor(0.0)
        both = list(map(_ranks, both)) if self.ranks else both
        return torch.corrcoef(torch.stack(both))[0, 1]


def _ranks(scores: Tensor) -> Tensor:  # (n,) -> (n,)
    """Return the rank of each score; ties share their mean rank."""
    _, which, counts = scores.unique(return_inverse=True, return_counts=True)
    counts = counts.double()
    return (counts.cumsum(0) - (counts - 1) / 2)[which]


def metric_of(measure: str, num_labels: int) -> Metric:
    """Return the torchmetrics object for a measure that is not a mean over rows.

    Args:
        measure: `f1` (of class 1, for two classes), `matthews`, `pearson` or `spearman`.
        num_labels: number of classes; 1 for a regression.
    """
    if measure == "f1" and num_labels == 2:
        return BinaryF1Score()
    if measure == "matthews" and num_labels > 1:
        return Matthews(num_labels)
    if measure in ("pearson", "spearman") and num_labels == 1:
        return Correlation(ranks=measure == "spearman")
    raise ValueError(f"no measure {measure!r} for {num_labels} labels")


def interval_of(measure: str, metric: Metric, value: float, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a measure computed by a metric over `total` rows."""
    if measure == "f1":
        # with several processes the states are only those of this one, so the denominator is scaled up to all rows
        tp, fp, fn, tn = (float(getattr(metric, name).sum()) for name in ("tp", "fp", "fn", "tn"))
        return f1_interval(value, (2 * tp + fp + fn) * total / max(tp + fp + fn + tn, 1))
    return correlation_interval(value, total, ranks=measure == "spearman")


def correlation_interval(r: float, total: int, ranks: bool = False) -> tuple[float, float]:
    r"""Return a 95 % interval of a correlation r over n rows by Fisher's z; (-1, 1) for fewer than 4 rows.

    .. math:: \tanh(\operatorname{artanh} r \pm z \sigma), \quad \sigma^2 = \frac{1}{n - 3}
        \text{, for ranks } \frac{1 + r^2 / 2}{n - 3}

    Sources: Fisher 1915, Biometrika 10(4), exact for normal variables; for ranks Bonett and Wright 2000,
    Psychometrika 65(1). Matthews' coefficient is Pearson's for two binary variables, where the interval is an
    approximation that holds unless one of the classes is rare.

    >>> [round(end, 3) for end in correlation_interval(0.5, 103)]
    [0.339, 0.632]
    """
    if total < 4:
        return -1.0, 1.0
    if abs(r) >= 1:
        return r, r
    sigma = math.sqrt((1 + r * r / 2 if ranks else 1) / (total - 3))
    centre = math.atanh(r)
    return math.tanh(centre - Z * sigma), math.tanh(centre + Z * sigma)


def f1_interval(f1: float, denominator: float) -> tuple[float, float]:
    r"""Return a 95 % interval of F1 by the delta method over the counts of the four outcomes.

    .. math:: F \pm z \sqrt{\frac{F (1 - F) (2 - F)}{2 TP + FP + FN}}, \quad F = \frac{2 TP}{2 TP + FP + FN}

    (TP and FP + FN are multinomial; their covariance cancels because F depends only on their ratio.)

    >>> [round(end, 3) for end in f1_interval(0.8, 500)]
    [0.762, 0.838]
    """
    if denominator <= 0:
        return 0.0, 1.0
    half = Z * math.sqrt(f1 * (1 - f1) * (2 - f1) / denominator)
    return max(f1 - half, 0.0), min(f1 + half, 1.0)
