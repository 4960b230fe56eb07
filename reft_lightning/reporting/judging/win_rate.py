r"""The win rate of one model against another, its standard error, and length control.

A judgement is AlpacaEval's ``preference`` (https://github.com/tatsu-lab/alpaca_eval): 1 if ``output_1``, the reference,
is better, 2 if ``output_2`` is, 0 or 1.5 for a draw, a number between 1 and 2 for 1 + the probability of the second,
None for a pair that was not judged. A win rate is meaningless without its reference model, so a result names both.

Shapes: n judged rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...suggest import needs_extra

LENGTH_CONTROL = (
    "logistic regression on an intercept and tanh(length difference / its standard deviation); "
    "without the instruction-difficulty term of arXiv:2404.04475"
)
Z = 1.959964  # quantile of the normal distribution for 95 %
RIDGE = 1e-6  # keeps the coefficients finite if one model wins every row


def share_of_win(preference: float | None, where: str = "annotation") -> float | None:
    """Return a judgement as a share of a win: 0 for the reference, 1 for the model, 0.5 for a draw, None unjudged.

    >>> share_of_win(2), share_of_win(0), share_of_win(1.25), share_of_win(None)
    (1.0, 0.5, 0.25, None)

    Raises:
        ValueError: for anything other than None, 0 and 1..2.
    """
    if preference is None:
        return None
    if isinstance(preference, bool) or not isinstance(preference, int | float):
        raise ValueError(f"{where}: preference must be a number or null; got {preference!r}")
    if math.isnan(preference):  # how pandas writes null
        return None
    if preference == 0:
        return 0.5
    if not 1 <= preference <= 2:
        raise ValueError(
            f"{where}: preference must be 1 (the reference is better), 2 (the model is), a number between, "
            f"0 or 1.5 (draw), or null; got {preference!r}"
        )
    return float(preference) - 1


def win_rate(
    annotations: Sequence[Mapping[str, Any]],
    generator: str | None = None,
    reference: str | None = None,
    judge: str | None = None,
) -> dict[str, Any]:
    r"""Return the win rate of a model against a reference model in percent.

    .. math:: \mathrm{WR} = \frac{100}{n} \sum_i w_i, \qquad \mathrm{SE} = \frac{100\, s(w)}{\sqrt n}

    with :math:`w_i` the share of a win of row i (``share_of_win``), s their sample standard deviation and n the
    number of judged rows: draws count half, unjudged rows are left out and counted. ``discrete_win_rate`` counts a
    preference of 1.9 as a win; ``interval`` is at 95 %; lengths and length control need outputs in all rows.

    Give the names of the model, the reference and the judge if the rows, in AlpacaEval's format, do not have them.

    Raises:
        ValueError: if no row was judged, or the rows disagree on the models or the judge.
    """
    names = {
        "generator": one_name(annotations, "generator_2", generator, "generator"),
        "reference": one_name(annotations, "generator_1", reference, "reference_name"),
        "judge": one_name(annotations, "annotator", judge, "judge"),
    }
    shares = [share_of_win(row["preference"], f"annotation {i}") for i, row in enumerate(annotations)]
    rows = [row for row, share in zip(annotations, shares, strict=True) if share is not None]
    if not rows:
        raise ValueError(f"none of the {len(annotations)} rows was judged, so there is no win rate")
    w = np.asarray([share for share in shares if share is not None])
    rate, error = _mean(w)
    half = Z * (error or 0.0)
    result: dict[str, Any] = {
        "win_rate": rate, "standard_error": error,
        "interval": None if error is None else [max(rate - half, 0.0), min(rate + half, 100.0)],
        "n_total": len(w), "n_wins": int((w > 0.5).sum()), "n_wins_reference": int((w < 0.5).sum()),
        "n_draws": int((w == 0.5).sum()), "n_unjudged": len(annotations) - len(w),
        "discrete_win_rate": 100 * float(((w > 0.5) + 0.5 * (w == 0.5)).mean()), **names,
    }  # fmt: skip
    if all("output_1" in row and "output_2" in row for row in rows):
        lengths = np.asarray([(len(row["output_2"]), len(row["output_1"])) for row in rows], dtype=float)
        controlled, its_error = length_controlled(w, lengths[:, 0] - lengths[:, 1])
        result |= {
            "avg_length": float(lengths[:, 0].mean()),
            "avg_length_reference": float(lengths[:, 1].mean()),
            "length_controlled_win_rate": controlled,
            "length_controlled_standard_error": its_error,
            "length_control": LENGTH_CONTROL,
        }
    return result


def one_name(rows: Sequence[Mapping[str, Any]], column: str, given: str | None, option: str) -> str:
    """Return the name that a column of all rows agrees on."""
    names = {str(row[column]) for row in rows if row.get(column)} | ({given} if given else set())
    if len(names) != 1:
        raise ValueError(
            f"{column} must be the same name in all rows; got {', '.join(sorted(names)) or 'none'} (a win rate is "
            f"recorded with model, reference and judge; {option}=NAME gives a name that is missing in the rows)"
        )
    return names.pop()


def _mean(w: np.ndarray) -> tuple[float, float | None]:  # (n,) -> percent, standard error
    error = 100 * float(w.std(ddof=1)) / math.sqrt(len(w)) if len(w) > 1 else None
    return 100 * float(w.mean()), error


def length_controlled(
    w: np.ndarray,  # (n,), share of a win, 0..1
    difference: np.ndarray,  # (n,), length of the model's output minus the reference's, in characters
) -> tuple[float | None, float | None]:
    r"""Return the win rate that a model would have if its outputs were as long as the reference's, and its error.

    .. math::
        \operatorname{logit} E[w_i] = \theta + \varphi \tanh(\Delta_i / \operatorname{sd}(\Delta)), \qquad
        \mathrm{LC} = 100 \operatorname{logistic}(\theta)

    Source: Dubois et al. 2024, arXiv:2404.04475, eq. 1. Theirs adds a difficulty for every instruction, fitted on all
    models of their leaderboard together and published as weights in their package, and a penalty chosen by
    cross-validation; the judgements of a single model do not identify a difficulty. On their judgements of alpaca-7b
    this gives 25.7, while their leaderboard has 26.3.

    The error is from the delta method, with the robust covariance (w may be between 0 and 1).

    Returns:
        (percent, standard error in percent); the plain win rate if all lengths are equal; (None, None) if all
        differences are the same number other than 0, which leaves the effect of length undetermined.
    """
    with needs_extra("judge", "length control needs scipy"):
        from scipy.optimize import minimize
        from scipy.special import expit
    spread = float(difference.std())
    if spread == 0:
        return _mean(w) if difference[0] == 0 else (None, None)
    x = np.stack([np.ones_like(w), np.tanh(difference / spread)], axis=1)  # (n, 2)
    ridge = RIDGE * np.eye(2)

    def loss(beta: np.ndarray) -> tuple[float, np.ndarray]:  # per row, as its gradient and hessian
        z = x @ beta
        value = float((np.logaddexp(0, z) - w * z).mean() + beta @ ridge @ beta / 2)
        return value, x.T @ (expit(z) - w) / len(w) + ridge @ beta

    def hessian(beta: np.ndarray) -> np.ndarray:
        p = expit(x @ beta)
        return (x.T * (p * (1 - p))) @ x / len(w) + ridge

    beta = minimize(loss, np.zeros(2), method="trust-exact", jac=True, hess=hessian, tol=1e-12).x
    bread = np.linalg.inv(hessian(beta)) / len(w)
    covariance = bread @ ((x.T * (w - expit(x @ beta)) ** 2) @ x) @ bread
    p = float(expit(beta[0]))
    return 100 * p, 100 * p * (1 - p) * math.sqrt(max(covariance[0, 0], 0.0))
