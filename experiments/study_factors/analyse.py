r"""How much of a score each factor explains: an analysis of variance of a full factorial with seeds as blocks.

    python experiments/study_factors/analyse.py experiments/study_factors/cells.jsonl [RUN_FOLDER ...]
    python experiments/study_factors/analyse.py experiments/study_factors/decoder.jsonl STUDY/winners/*/* \
        --score test/accuracy

Run folders are first copied into the file, one line each; then the tables are printed.

With factors formula, positions and layers and one run for each of their combinations and each seed,

    y = mean + seed + sum over nonempty sets S of factors of effect_S + residual,

where effect_S is, by inclusion and exclusion, the mean over what S fixes less the effects of S's proper subsets. The
sums of squares of the effects, of the seeds and of the residual add up to the total. F compares an effect's mean square
with the residual's (the seeds x cells interaction), and omega squared, (SS - df MS_residual) / (SS_total +
MS_residual), is the share of the variance that the effect explains, less what noise alone would seem to explain.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from scipy import stats

FACTORS = ("formula", "positions", "layers")


def analysis(y: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the table of the analysis: one row for each set of factors, for the seeds and for the residual.

    Args:
        y: one axis a factor, in the order of ``names``, and a last axis of seeds, two at least.
        names: of the factors.
    """
    seeds, cells = y.shape[-1], y[..., 0].size
    effects: dict[tuple[int, ...], np.ndarray] = {(): y.mean(keepdims=True)}
    rows = []
    for size in range(1, len(names) + 1):
        for chosen in itertools.combinations(range(len(names)), size):
            others = tuple(axis for axis in range(y.ndim) if axis not in chosen)
            effect = y.mean(axis=others, keepdims=True)
            for smaller, part in effects.items():
                if set(smaller) < set(chosen):
                    effect = effect - part
            effects[chosen] = effect
            df = int(np.prod([y.shape[axis] - 1 for axis in chosen]))
            squares = float((effect**2).sum() * y.size / effect.size)
            rows.append({"source": " x ".join(names[axis] for axis in chosen), "df": df, "ss": squares})
    means = y.reshape(-1, seeds).mean(axis=0)
    blocks = float(cells * ((means - y.mean()) ** 2).sum())
    total = float(((y - y.mean()) ** 2).sum())
    rest, rest_df = total - blocks - sum(row["ss"] for row in rows), (seeds - 1) * (cells - 1)
    noise = rest / rest_df
    rows.append({"source": "seed", "df": seeds - 1, "ss": blocks})
    for row in rows:
        row["F"] = row["ss"] / row["df"] / noise
        row["p"] = float(stats.f.sf(row["F"], row["df"], rest_df))
        row["omega2"] = (row["ss"] - row["df"] * noise) / (total + noise)
    return [*rows, {"source": "residual", "df": rest_df, "ss": rest}]


def read_run(folder: Path, score: str) -> dict[str, Any]:
    """Return what the analysis needs of a run, whose score is a metric of its results."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    if results["status"] != "complete":
        raise SystemExit(f"{folder} is not complete: {results['status']}")
    whole = OmegaConf.load(folder / "config.yaml")
    config = whole.intervention
    return {
        "formula": config.method,
        "positions": str(config.positions),
        "layers": str(config.layers),
        "lr": whole.optimizer.lr,
        "seed": results["seed"],
        "score": results["metrics"][score],
        "parameters": results["trainable_parameters"],
        "commit": results["git_commit"],
    }


def levels(runs: Sequence[dict[str, Any]], name: str) -> list[Any]:
    """Return the values of a factor, in the order in which they were first seen."""
    return list(dict.fromkeys(run[name] for run in runs))


def print_cells(runs: Sequence[dict[str, Any]]) -> None:
    """Print mean and standard deviation of every cell, one table row for a formula and its layers."""
    positions = levels(runs, "positions")
    print("| formula | layers | " + " | ".join(positions) + " |")
    print("|---" * (2 + len(positions)) + "|")
    for formula, layers in itertools.product(levels(runs, "formula"), levels(runs, "layers")):
        found = [
            [
                100 * r["score"]
                for r in runs
                if (r["formula"], r["positions"], r["layers"]) == (formula, place, layers)
            ]
            for place in positions
        ]
        cells = [f"{np.mean(scores):.1f} ± {np.std(scores, ddof=1):.1f}" for scores in found]
        print(f"| {formula} | {layers} | " + " | ".join(cells) + " |")


def print_margins(runs: Sequence[dict[str, Any]]) -> None:
    """Print the mean over all runs of each level of each factor."""
    for name in FACTORS:
        means = {
            level: np.mean([100 * r["score"] for r in runs if r[name] == level])
            for level in levels(runs, name)
        }
        print(f"- {name}: " + ", ".join(f"{level} {mean:.1f}" for level, mean in means.items()))


def main() -> None:
    """Read the cells, from run folders where any are given, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="of the lines")
    parser.add_argument("folders", type=Path, nargs="*", help="of runs")
    parser.add_argument("--score", default="val/stsb/pearson", help="a metric of results.json")
    given = parser.parse_args()
    path = given.path
    if given.folders:
        runs = [read_run(folder, given.score) for folder in given.folders]
        path.write_text("".join(json.dumps(run) + "\n" for run in runs), encoding="utf-8")
    runs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    axes = {name: levels(runs, name) for name in (*FACTORS, "seed")}
    y = np.full([len(values) for values in axes.values()], np.nan)
    for run in runs:
        y[tuple(values.index(run[name]) for name, values in axes.items())] = 100 * run["score"]
    if np.isnan(y).any() or len(runs) != y.size:
        raise SystemExit(f"{len(runs)} runs do not fill a factorial of {' x '.join(map(str, y.shape))}")
    print_cells(runs)
    print()
    print_margins(runs)
    print("\n| source | df | sum of squares | F | p | omega squared |\n|---|---|---|---|---|---|")
    for row in analysis(y, FACTORS):
        more = f"{row['F']:.1f} | {row['p']:.2g} | {row['omega2']:.3f}" if "F" in row else " | | "
        print(f"| {row['source']} | {row['df']} | {row['ss']:.0f} | {more} |")


if __name__ == "__main__":
    main()
