"""How often a test over seeds calls methods with equal means different, and how often it finds one that is better.

    python experiments/pooled_seeds/simulate.py

Scores over seeds are normal, and rows give no variance, as with very many of them. `welch` is Welch's test. `then` and
`now` count no method's variance over seeds as smaller than the mean over the table: `then` with the degrees of freedom
of its own seeds, `now` with those that Satterthwaite gives the mean, and no pair with more
(`reft_lightning/reporting/pairs.py`). All three are adjusted by Holm. Writes `levels.csv`: the share of tables of equal
means in which some pair differs, and, `_found`, the share of pairs found with a method whose mean is ten higher.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

HERE = Path(__file__).parent
TABLES = 6000
BETTER = 10.0
TESTS = ("welch", "then", "now")
Array = NDArray[np.float64]


def spreads(methods: int) -> dict[str, Array]:
    """Return standard deviations over seeds of the methods of a table."""
    return {
        "equal": np.ones(methods),
        "one five times as wide": np.r_[5.0, np.ones(methods - 1)],
        "every second three times as wide": np.where(np.arange(methods) % 2, 3.0, 1.0),
        "from 0.1 to 3": np.geomspace(0.1, 3, methods),
    }


def p_values(scores: Array, test: str) -> Array:  # (tables, methods, seeds) -> (tables, pairs)
    """Return the p-value of each pair, after Holm's correction."""
    seeds = scores.shape[2]
    means, variances = scores.mean(2), scores.var(2, ddof=1)
    least = np.zeros((len(scores), 1)) if test == "welch" else variances.mean(1, keepdims=True)
    own = seeds - 1.0
    of_mean = variances.sum(1) ** 2 / (variances**2 / own).sum(1)  # Satterthwaite's
    parts = np.maximum(variances, least) / seeds
    freedom = np.where(variances < least, of_mean[:, None] if test == "now" else own, own)
    i, j = np.triu_indices(scores.shape[1], 1)
    total = parts[:, i] + parts[:, j]
    of_pair = total**2 / (parts[:, i] ** 2 / freedom[:, i] + parts[:, j] ** 2 / freedom[:, j])
    if test == "now":
        of_pair = np.minimum(of_pair, of_mean[:, None])
    p = 2 * stats.t.sf(np.abs(means[:, i] - means[:, j]) / np.sqrt(total), of_pair)
    order = p.argsort(1)
    holm = np.maximum.accumulate(np.take_along_axis(p, order, 1) * (len(i) - np.arange(len(i))), 1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, holm, 1)
    return adjusted


def main() -> None:
    """Simulate, and write a line for each kind of table."""
    rng = np.random.default_rng(0)
    with (HERE / "levels.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["seeds", "methods", "spreads", *TESTS, *(f"{test}_found" for test in TESTS)])
        for seeds in (2, 3, 5):
            for methods in (2, 3, 5, 9):
                for name, deviations in spreads(methods).items():
                    scores = rng.standard_normal((TABLES, methods, seeds)) * deviations[None, :, None]
                    false = [float((p_values(scores, test).min(1) < 0.05).mean()) for test in TESTS]
                    scores[:, 0] += BETTER  # its pairs are the first
                    found = [
                        float((p_values(scores, test)[:, : methods - 1] < 0.05).mean()) for test in TESTS
                    ]
                    writer.writerow([seeds, methods, name, *(f"{share:.4f}" for share in false + found)])


if __name__ == "__main__":
    main()
