"""The pairs of this study by the test of 2026-11-29, whose variance over seeds is better known; predictions are gone.

    python experiments/study_methods/pairs_again.py

`pairs.csv` is of the earlier test. What is missing is the variance that rows give a difference. It is at most the sum
of both methods' own, which `results.jsonl` has as intervals: a mean over seeds has no larger one than its seeds, and on
the same rows two methods rather agree. With the sum p-values are at most these.
Writes `pairs_again.csv` into each folder.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

from reft_lightning.reporting.statistics import holm, satterthwaite, widest_t

HERE = Path(__file__).parent
SEEDS = 3
STUDIES = {"stsb": ("pearson", 750), "logic": ("accuracy", 160)}  # folder -> measure, test rows

NAMES = {"none": "head", "frozen": "frozen base"}  # of a method in the report


def read(path: Path, measure: str) -> list[dict[str, str]]:
    """Return the lines of a table that are about a measure."""
    with path.open(encoding="utf-8") as file:
        return [line for line in csv.DictReader(file) if line["measure"] == measure]


def row_variances(folder: Path, measure: str) -> dict[str, float]:
    """Return of each method the variance that rows give its score, the mean over seeds."""
    found: dict[str, list[float]] = {}
    for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines():
        results = json.loads(line)
        name = results["method"].removeprefix("peft/")
        for path, count in results["counts"].items():
            if path.startswith("test/") and path.endswith(f"/{measure}"):
                low, high = count["interval"]
                found.setdefault(NAMES.get(name, name), []).append(((high - low) / 2 / 1.96) ** 2)
    return {name: float(np.mean(variances)) for name, variances in found.items()}


def again(folder: Path, measure: str, rows: int) -> list[dict[str, object]]:
    """Return each pair with its earlier and its present p-values, the smallest first."""
    scores = {line["method"]: line["by_seed"] for line in read(folder / "scores.csv", measure)}
    variances = {
        method: float(np.var(list(json.loads(values).values()), ddof=1))
        for method, values in scores.items()
        if method != "frozen base"
    }
    root, freedom = satterthwaite([(variance, SEEDS - 1.0) for variance in variances.values()])
    pooled = root**2 / len(variances), freedom
    rows_of = row_variances(folder, measure)
    pairs = read(folder / "pairs.csv", measure)
    ps = []
    for pair in pairs:
        difference, both = float(pair["difference"]), [pair["first"], pair["second"]]
        own = [(variances[method], SEEDS - 1.0) for method in both if method in variances]
        error, found = satterthwaite([(v / SEEDS, f) for v, f in (max(part, pooled) for part in own)])
        now = error**2, min(found, freedom)

        of_rows = sum(rows_of[method] for method in both if method in rows_of)
        tests = [satterthwaite([(of_rows, rows - 1.0), now]), satterthwaite([now])]
        ps.append(max(widest_t(difference, tests)[0], float(pair["rows_p"])))
    lines = [
        {"first": pair["first"], "second": pair["second"], "difference": f"{float(pair['difference']):.4f}",
         "p_then": f"{float(pair['p']):.4f}", "p_holm_then": f"{float(pair['p_holm']):.4f}",
         "p": f"{p:.4f}", "p_holm": f"{adjusted:.4f}"}
        for pair, p, adjusted in zip(pairs, ps, holm(ps), strict=True)
    ]  # fmt: skip
    return sorted(lines, key=lambda line: line["p"])


def main() -> None:
    """Write both tables, and print how many pairs differ."""
    for name, (measure, rows) in STUDIES.items():
        lines = again(HERE / name, measure, rows)
        with (HERE / name / "pairs_again.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
        differing = sum(float(str(line["p_holm"])) < 0.05 for line in lines)
        print(f"{name}: {differing} of {len(lines)} pairs differ")


if __name__ == "__main__":
    main()
