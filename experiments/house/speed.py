"""Time of training and evaluation of two trees, as ratios of runs that take turns.

    python experiments/house/speed.py --before TREE --after TREE --model FOLDER --out speed.jsonl

TREE is a checkout; one environment serves both. A run is about 320 steps of 8 invented rows. Each line of the file is
one run; what is printed are medians over rounds of one time over the other of its round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from same import write_rows

RUNS = {
    "loreft_f7_l7": ["intervention.positions=f7+l7"],
    "loreft_l7": ["intervention.positions=l7"],
    "bf16": ["model.dtype=bfloat16"],
}


def train(tree: Path, model: Path, rows: Path, folder: Path, overrides: list[str]) -> dict:
    """Run to its end; return what ``results.json`` says of time."""
    arguments = [
        "model=stories260k", f"model.path={model}", "trainer=cpu", "data=boolq", "data.source=local",
        f"data.path={rows}", "data.batch_size=8", "data.validation_size=50",
        "trainer.max_epochs=3", "trainer.enable_progress_bar=false",
        "decoding.max_new_tokens=8", f"hydra.run.dir={folder}",
    ]  # fmt: skip
    subprocess.run(
        [str(Path(sys.executable).parent / "reft-train"), *arguments, *overrides], check=True, capture_output=True,
        env=os.environ | {"PYTHONPATH": str(tree), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    found = json.loads((folder / "results.json").read_text())
    return {
        "commit": found["git_commit"], "steps": found["steps"], "device": found["device"],
        "train_seconds": found["train_seconds"], "evaluation_seconds": sum(found["seconds"].values()),
    }  # fmt: skip


def ratios(rows: list[dict], run: str, what: str) -> list[float]:
    """Return after / before of each round that has both."""
    times = {(row["round"], row["tree"]): row[what] for row in rows if row["run"] == run}
    return [
        times[k, "after"] / times[k, "before"]
        for k, tree in times
        if tree == "after" and (k, "before") in times
    ]


def report(rows: list[dict]) -> str:
    lines = []
    for run in dict.fromkeys(row["run"] for row in rows):
        for what in ("train_seconds", "evaluation_seconds"):
            found = ratios(rows, run, what)
            spread = f"({min(found):.2f} to {max(found):.2f}), {len(found)} rounds"
            lines.append(f"{run} {what}: {statistics.median(found):.2f} {spread}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="a checkout")
    parser.add_argument("--after", type=Path, help="another")
    parser.add_argument("--model", type=Path, help="the folder of stories260K")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--out", type=Path, required=True, help="the file to write; without trees, the file to read"
    )
    options = parser.parse_args()
    if options.before is None:
        print(report([json.loads(line) for line in options.out.read_text().splitlines()]))
        return
    rows: list[dict] = []
    trees = [("before", options.before), ("after", options.after)]
    with tempfile.TemporaryDirectory() as scratch:
        place = write_rows(Path(scratch) / "rows", train=900, test=100)
        for run, overrides in RUNS.items():
            for k in range(options.rounds):
                for name, tree in trees if k % 2 else reversed(trees):
                    folder = Path(scratch) / f"{run}_{k}_{name}"
                    found = train(tree.resolve(), options.model.resolve(), place, folder, overrides)
                    rows.append({"run": run, "round": k, "tree": name, **found})
                    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(report(rows))


if __name__ == "__main__":
    main()
