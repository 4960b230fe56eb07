"""How often a table of methods with equal means shows a pair that differs, by the test of reports before and now.

    python experiments/pooled_seeds/simulate.py

Scores over seeds are normal, and rows give no variance, as with very many of them. `then` counts no method's variance
over seeds as smaller than the mean over the table, with the degrees of freedom of its own seeds; `now` gives that mean
those of Satterthwaite, and no pair more (`reft_lightning/reporting/pairs.py`). Writes `levels.csv`.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

HERE = Path(__file__).parent
TABLES = 6000
Array = NDArray[np.float64]


def spreads(methods: int) -> dict[str, Array]:
    """Return standard deviations over seeds of the methods of a table."""
    return {
        "equal": np.ones(methods),
        "one five times as wide": np.r_[5.0, np.ones(methods - 1)],
        "every second three times as wide": np.where(np.arange(methods) % 2, 3.0, 1.0),
        "from 0.1 to 3": np.geomspace(0.1, 3, methods),
    }


def any_false(scores: Array, pooled: bool) -> float:  # (tables, methods, seeds)
    """Return the share of tables with a pair that differs after Holm's correction."""
    seeds = scores.shape[2]
    means, variances = scores.mean(2), scores.var(2, ddof=1)
    least = variances.mean(1, keepdims=True)
    own = seeds - 1.0
    of_mean = variances.sum(1) ** 2 / (variances**2 / own).sum(1)  # Satterthwaite's
    parts = np.maximum(variances, least) / seeds
    freedom = np.where(variances < least, of_mean[:, None] if pooled else own, own)
    i, j = np.triu_indices(scores.shape[1], 1)
    total = parts[:, i] + parts[:, j]
    of_pair = total**2 / (parts[:, i] ** 2 / freedom[:, i] + parts[:, j] ** 2 / freedom[:, j])
    if pooled:
        of_pair = np.minimum(of_pair, of_mean[:, None])
    p = 2 * stats.t.sf(np.abs(means[:, i] - means[:, j]) / np.sqrt(total), of_pair)
    return float((p.min(1) * len(i) < 0.05).mean())  # the smallest p after Holm


def main() -> None:
    """Simulate, and write a line for each kind of table."""
    rng = np.random.default_rng(0)
    with (HERE / "levels.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["seeds", "methods", "spreads", "then", "now"])
        for seeds in (2, 3, 5):
            for methods in (2, 3, 5, 9):
                for name, deviations in spreads(methods).items():
                    scores = rng.standard_normal((TABLES, methods, seeds)) * deviations[None, :, None]
                    levels = [f"{any_false(scores, pooled):.4f}" for pooled in (False, True)]
                    writer.writerow([seeds, methods, name, *levels])


if __name__ == "__main__":
    main()
