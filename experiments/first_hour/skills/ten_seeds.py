"""LoReFT against LoRA at ten seeds: differences of the means, with errors over rows and over seeds.

python experiments/first_hour/skills/ten_seeds.py

`ten_seeds_rows.csv` has for each test row how many of ten seeds answered it right; the scores of each seed are in
`float32.jsonl` (seeds 42 to 44) and `ten_seeds.jsonl` (45 to 51).
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

HERE = Path(__file__).parent
MEASURES = {"generated": "test/accuracy", "option": "test/option_accuracy"}
METHODS = {"loreft": "loreft", "lora": "peft/lora"}
SEEDS = range(42, 52)


def scores(measure: str) -> dict[str, np.ndarray]:  # method -> (10,), in percent
    """Return the score of each seed of a method: one thread, and the rate of the table."""
    lines = [
        json.loads(line) for name in ("float32.jsonl", "ten_seeds.jsonl") for line in (HERE / name).open()
    ]
    found = {
        (run["method"], run["seed"]): 100 * run["metrics"][MEASURES[measure]]
        for run in lines
        if MEASURES[measure] in run["metrics"]
        and run["command"] != "reft-train experiment=quickstart"  # two threads
    }
    return {name: np.array([found[method, seed] for seed in SEEDS]) for name, method in METHODS.items()}


def main() -> None:
    rows = pd.read_csv(HERE / "ten_seeds_rows.csv")
    for measure in MEASURES:
        own = scores(measure)
        per_row = 100 * (rows[f"loreft_{measure}"] - rows[f"lora_{measure}"]) / len(SEEDS)
        over_seeds = np.sqrt(sum(values.var(ddof=1) / len(values) for values in own.values()))
        over_rows = per_row.std(ddof=1) / np.sqrt(len(per_row))
        error, difference = np.hypot(over_seeds, over_rows), per_row.mean()
        welch = stats.ttest_ind(own["loreft"], own["lora"], equal_var=False)
        for name, values in own.items():
            print(
                f"{measure}, {name}: {values.mean():.1f} +- {values.std(ddof=1):.1f}: {values.round(1).tolist()}"
            )
        print(
            f"{measure}, difference: {difference:.2f}; over seeds p = {welch.pvalue:.2g}; over rows and seeds "
            f"[{difference - 1.96 * error:.1f}, {difference + 1.96 * error:.1f}], "
            f"p = {2 * stats.norm.sf(abs(difference) / error):.2g}"
        )


if __name__ == "__main__":
    main()
