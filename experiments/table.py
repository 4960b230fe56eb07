"""Print the scores of a results.jsonl as a Markdown table: one row a method, task and measure, one column a seed.

python experiments/table.py experiments/families/results.jsonl
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path


def main() -> None:
    (path,) = map(Path, sys.argv[1:])
    runs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    seeds = sorted({run["seed"] for run in runs})
    cells: dict[tuple[str, str, str], dict[int, str]] = defaultdict(dict)
    values: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for run in runs:
        split = "test" if any("/test/" in f"/{name}" for name in run["counts"]) else "val"
        for name, value in run["metrics"].items():
            who = "frozen base" if name.startswith("base/") else run["method"]
            parts = name.removeprefix("base/").split("/")
            # scores of tasks; the loss is one number over all
            if parts[0] != split or (len(parts) < 3 and parts[-1] != "loss"):
                continue
            if parts[-1] == "loss" and run["counts"]:
                continue  # a held-out loss of validation rows, in addition to scores
            tasks = "+".join(sorted(run["data_versions"]["train"]))
            key = (f"{tasks}", who, "/".join(parts[1:]))
            count = run["counts"].get(name)
            if parts[-1] == "loss":
                cells[key][run["seed"]] = f"{value:.4f}"
                values[key].append(value)
            else:
                interval = ""
                if count:
                    interval = " [{:.1f}, {:.1f}]".format(*(100 * end for end in count["interval"]))
                cells[key][run["seed"]] = f"{100 * value:.1f}{interval}"
                values[key].append(100 * value)
    print(
        "| trained on | model | task, measure | "
        + " | ".join(f"seed {seed}" for seed in seeds)
        + " | mean (SD) |"
    )
    print("|---" * (len(seeds) + 4) + "|")
    for key in sorted(cells, key=lambda key: (key[0], key[2], key[1])):
        found = values[key]
        spread = f" ({statistics.stdev(found):.2g})" if len(found) > 1 else ""
        row = [key[0], key[1], key[2], *(cells[key].get(seed, "-") for seed in seeds)]
        print("| " + " | ".join(row) + f" | {statistics.mean(found):.4g}{spread} |")


if __name__ == "__main__":
    main()
