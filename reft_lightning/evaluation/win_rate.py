r"""How often a judge prefers one model to another: the win rate, its standard error, and length control.

A judgement is AlpacaEval's `preference` (https://github.com/tatsu-lab/alpaca_eval): 1 says that `output_1`, the
reference, is better, 2 that `output_2` is, 0 or 1.5 that neither is, a number between 1 and 2 is 1 + the
probability of the second, None says that the pair was not judged. A win rate means nothing without its reference
model, so a result always names both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

DRAW = 1.5
LENGTH_ONLY = (
    "logistic regression on an intercept and tanh(length difference / its standard deviation); "
    "without the instruction-difficulty term of arXiv:2404.04475"
)
WITH_DIFFICULTY = (
    "logistic regression on an intercept, tanh(length difference / its standard deviation) and difficulty"
)


def share_of_win(preference: float | None, where: str = "annotation") -> float | None:
    """Return how much of a win a judgement is: 0 for the reference, 1 for the model, 0.5 for a draw, None unjudged.

    >>> share_of_win(2), share_of_win(0), share_of_win(1.25), share_of_win(None)
    (1.0, 0.5, 0.25, None)

    Raises:
        ValueError: for anything else than None, 0 and 1..2.
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
    difficulty: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    r"""Return the win rate of a model against a reference model in percent.

    .. math:: \mathrm{WR} = \frac{100}{n} \sum_i w_i, \qquad \mathrm{SE} = \frac{100\, s(w)}{\sqrt n}

    with :math:`w_i` the share of a win of row i (`share_of_win`), s their sample standard deviation and n the
    number of judged rows: draws count half, rows that were not judged are left out and counted.

    Args:
        annotations: rows with `preference`; `generator_1`, `generator_2` and `annotator` where known;
            `output_1` and `output_2` for length control.
        generator: the model, where the rows do not name it.
        reference: the model it is compared with, where the rows do not name it.
        judge: who judged, where the rows do not name it.
        difficulty: instruction -> difficulty, for the full length control, see `length_controlled`.

    Returns:
        win_rate, standard_error (None for one row), interval (95 %), n_total, n_wins, n_wins_reference, n_draws,
        n_unjudged,
        discrete_win_rate (which counts a preference of 1.9 as a win), generator, reference, judge, and with
        outputs in all rows: avg_length, avg_length_reference, length_controlled_win_rate,
        length_controlled_standard_error and length_control (how it was computed).

    Raises:
        ValueError: if no row was judged, or the rows do not agree on who is compared with whom.
    """
    names = {
        "generator": _one_name(annotations, "generator_2", generator),
        "reference": _one_name(annotations, "generator_1", reference),
        "judge": _one_name(annotations, "annotator", judge),
    }
    shares = [share_of_win(row["preference"], f"annotation {i}") for i, row in enumerate(annotations)]
    judged = [(row, w) for row, w in zip(annotations, shares, strict=True) if w is not None]
    if not judged:
        raise ValueError(f"none of {len(annotations)} rows was judged: there is no win rate")
    w = np.asarray([share for _, share in judged])
    rate, error = 100 * float(w.mean()), _standard_error(w)
    half = 1.959964 * (error or 0.0)
    result: dict[str, Any] = {
        "win_rate": rate,
        "standard_error": error,
        "interval": None if error is None else [max(rate - half, 0.0), min(rate + half, 100.0)],
        "n_total": len(w),
        "n_wins": int((w > 0.5).sum()),
        "n_wins_reference": int((w < 0.5).sum()),
        "n_draws": int((w == 0.5).sum()),
        "n_unjudged": len(annotations) - len(judged),
        "discrete_win_rate": 100 * float(((w > 0.5) + 0.5 * (w == 0.5)).mean()),
        **names,
    }
    rows = [row for row, _ in judged]
    if all("output_1" in row and "output_2" in row for row in rows):
        result |= _length_control(rows, w, difficulty)
    return result


def _standard_error(w: np.ndarray) -> float | None:  # (n,) -> percent
    return 100 * float(w.std(ddof=1)) / math.sqrt(len(w)) if len(w) > 1 else None


def _one_name(annotations: Sequence[Mapping[str, Any]], column: str, given: str | None) -> str:
    named = {str(row[column]) for row in annotations if row.get(column)}
    if given:
        named.add(given)
    if not named:
        raise ValueError(
            f"the rows have no {column}: say who it is, a win rate is recorded with model, reference and judge"
        )
    if len(named) > 1:
        raise ValueError(f"{column} must be one for all rows; got {', '.join(sorted(named))}")
    return named.pop()


# ------------------------------------------------------------------------------------------- length control


def _length_control(
    rows: Sequence[Mapping[str, Any]], w: np.ndarray, difficulty: Mapping[str, float] | None
) -> dict[str, Any]:
    lengths = np.asarray([(len(row["output_2"]), len(row["output_1"])) for row in rows], dtype=float)
    gamma = None if difficulty is None else _difficulties(rows, difficulty)
    rate, error = length_controlled(w, lengths[:, 0] - lengths[:, 1], gamma)
    return {
        "avg_length": float(lengths[:, 0].mean()),
        "avg_length_reference": float(lengths[:, 1].mean()),
        "length_controlled_win_rate": rate,
        "length_controlled_standard_error": error,
        "length_control": LENGTH_ONLY if gamma is None else WITH_DIFFICULTY,
    }


def _difficulties(rows: Sequence[Mapping[str, Any]], difficulty: Mapping[str, float]) -> np.ndarray:
    missing = [row["instruction"] for row in rows if row["instruction"] not in difficulty]
    if missing:
        raise ValueError(f"{len(missing)} instructions have no difficulty, the first is {missing[0]!r:.80}")
    return np.asarray([float(difficulty[row["instruction"]]) for row in rows])


def length_controlled(
    w: np.ndarray,  # (n,), share of a win, 0..1
    difference: np.ndarray,  # (n,), length of the model's output minus the reference's, in characters
    difficulty: np.ndarray | None = None,  # (n,)
) -> tuple[float | None, float | None]:
    r"""Return the win rate that a model would have with outputs as long as the reference's, and its error.

    .. math::
        \operatorname{logit} E[w_i] = \theta + \varphi \tanh(\Delta_i / \operatorname{sd}(\Delta)) + \psi \gamma_i,
        \qquad \mathrm{LC} = \frac{100}{n} \sum_i \operatorname{logistic}(\theta + \psi \gamma_i)

    Source: Dubois et al. 2024, arXiv:2404.04475, eq. 1. Theirs is this regression with a difficulty
    :math:`\gamma_i` of every instruction, fitted on all models of their leaderboard together and published as
    weights of their package, and a penalty that they choose by cross-validation. With judgements of one model
    alone :math:`\gamma` cannot be estimated: without `difficulty` its term is left out, and there is no penalty.
    On their judgements of alpaca-7b this gives 25.7 where their leaderboard says 26.3.

    The error is the delta method's, on the robust covariance (w may lie between 0 and 1).

    Returns:
        (percent, standard error in percent); (None, None) where the differences do not allow it: all are the
        same number other than 0. With no difference at all there is nothing to control, and the win rate
        returns.
    """
    spread = float(difference.std())
    if spread == 0:
        same = float(difference[0]) == 0 and difficulty is None
        return (100 * float(w.mean()), _standard_error(w)) if same else (None, None)
    ones = np.ones_like(w)
    columns = [ones, np.tanh(difference / spread)] + ([] if difficulty is None else [difficulty])
    x = np.stack(columns, axis=1)  # (n, 2 or 3)
    beta, covariance = _logistic_regression(x, w)
    x[:, 1] = 0  # the same length
    p = _logistic(x @ beta)
    slope = ((p * (1 - p))[:, None] * x).mean(axis=0)
    return 100 * float(p.mean()), 100 * math.sqrt(max(float(slope @ covariance @ slope), 0.0))


RIDGE = 1e-6  # keeps the coefficients finite where one model wins every row


def _logistic_regression(x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return coefficients (k,) and their robust covariance (k, k), by Newton's method with halved steps."""
    n, k = x.shape
    ridge = RIDGE * n * np.eye(k)
    beta = np.zeros(k)

    def loss(beta: np.ndarray) -> float:
        z = x @ beta
        return float((np.logaddexp(0, z) - w * z).sum() + 0.5 * beta @ ridge @ beta)

    for _ in range(100):
        p = _logistic(x @ beta)
        gradient = x.T @ (p - w) + ridge @ beta
        hessian = (x * (p * (1 - p))[:, None]).T @ x + ridge
        step = np.linalg.solve(hessian, gradient)
        while loss(beta - step) > loss(beta) + 1e-12 and np.abs(step).max() > 1e-12:
            step = step / 2
        beta = beta - step
        if np.abs(step).max() < 1e-9:
            break
    p = _logistic(x @ beta)
    bread = np.linalg.inv((x * (p * (1 - p))[:, None]).T @ x + ridge)
    meat = (x * ((w - p) ** 2)[:, None]).T @ x
    return beta, bread @ meat @ bread


def _logistic(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -z))  # no overflow on either side
