"""A sweep on one frozen base model against its jobs one by one: seconds of training, and memory.

    python experiments/speed/shared_base.py --out experiments/speed/shared_base.json
    python experiments/speed/shared_base.py --model model=smollm2_135m --counts 1 4 --rounds 1 --out FILE
    python experiments/speed/shared_base.py --accelerator gpu --out FILE            # on a machine with a CUDA device

Each figure is of a process of its own that runs ``reft-train -m`` over so many learning rates of one LoReFT (rank 8,
all layers), with ``launcher=shared_base`` and without, in turns. ``seconds`` is from the first step to the end of the
last one, of all jobs; ``memory`` is the peak of the process (on a GPU: of torch on it); ``cpu`` is its seconds on
processors, from its start to its end. Memory of n runs at the same time in processes of their own is n times that of
one. Weights and rows are random: costs do not depend on them.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WORDS = ["river", "stone", "candle", "orchard", "window", "marble", "thunder", "ladder"]
# a Llama of 25 million parameters, in which the base model is most of a step
RANDOM = [
    "model=tiny_random", "model.config.hidden_size=512", "model.config.intermediate_size=1408",
    "model.config.num_hidden_layers=8", "model.config.num_attention_heads=8", "model.config.num_key_value_heads=8",
]  # fmt: skip
KEYS = ("seconds", "cpu", "memory")
POSITIONS = {"f7+l7": "f7+l7", "l1": "l1"}  # with l1 the prompt runs without gradient
# runs the command, then prints the peaks of its process
COMMAND = """
import resource, sys
from reft_lightning import cli
sys.argv = ["reft-train", *sys.argv[1:]]
cli.train()
import torch
gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
used = resource.getrusage(resource.RUSAGE_SELF)
print("USED", gpu or used.ru_maxrss * 1024, used.ru_utime + used.ru_stime)
"""


def write_rows(path: Path, count: int, words: int) -> None:
    """Write random questions of so many words with answers of one."""
    draw = random.Random(0)
    rows = [{"q": " ".join(draw.choices(WORDS, k=words)), "a": draw.choice(WORDS)} for _ in range(count)]
    path.write_text(json.dumps(rows))


def measure(arguments: list[str], shared: bool) -> dict[str, float]:
    """Return seconds of training and the peak of memory of one sweep."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["launcher=shared_base", "hydra.launcher.together=64"] if shared else []
        argv = ["-m", *arguments, *launcher, f"hydra.sweep.dir={folder}"]
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *argv], capture_output=True, text=True, env={**os.environ}
        )
        if done.returncode:
            raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
        seconds = []
        for path in Path(folder).glob("*/csv/metrics.csv"):
            with path.open(newline="") as file:
                seconds.append(
                    max(
                        float(r["progress/seconds"])
                        for r in csv.DictReader(file)
                        if r.get("progress/seconds")
                    )
                )
        used = next(line.split()[1:] for line in done.stdout.splitlines() if line.startswith("USED"))
        # side by side all end together; one by one each has its own time
        return {
            "seconds": max(seconds) if shared else sum(seconds),
            "memory": float(used[0]),
            "cpu": float(used[1]),
        }


def compare(count: int, arguments: list[str], rounds: int) -> dict[str, Any]:
    """Return medians and ranges over rounds of the ratios of shared to apart, which take turns."""
    rates = ",".join(f"{1e-3 * (1 + i / 100):.5f}" for i in range(count))
    found = []
    for _ in range(rounds):
        pair = {
            name: measure([*arguments, f"optimizer.lr={rates}"], name == "shared")
            for name in ("apart", "shared")
        }
        found.append(pair)
        print(count, json.dumps(pair), file=sys.stderr, flush=True)
    ratios = {key: [pair["shared"][key] / pair["apart"][key] for pair in found] for key in KEYS}
    return {
        "adapters": count, "rounds": found,
        **{f"{key}_ratio": statistics.median(values) for key, values in ratios.items()},
        **{f"{key}_range": [min(values), max(values)] for key, values in ratios.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--words", type=int, default=12)
    parser.add_argument("--model", nargs="+", default=RANDOM, help="arguments of reft-train that choose it")
    parser.add_argument("--accelerator", default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        write_rows(rows, options.batch * options.steps + 8, options.words)
        fixed = [
            *options.model, "data=custom", f"data.path={rows}", "data.prompt=q", "data.target=a",
            "data.validation_size=8", f"data.batch_size={options.batch}", "decoding.max_new_tokens=2",
            "trainer.max_epochs=1", "test=false",
            f"trainer.accelerator={options.accelerator}", "trainer.log_every_n_steps=1",
            "trainer.enable_progress_bar=false", "intervention.rank=8",
        ]  # fmt: skip
        results = {
            name: [
                compare(n, [*fixed, f"intervention.positions={spec}"], options.rounds) for n in options.counts
            ]
            for name, spec in POSITIONS.items()
        }
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "out"}
    options.out.write_text(
        json.dumps({"settings": settings, "cpus": os.cpu_count(), "results": results}, indent=1) + "\n"
    )
    for name, rows_of in results.items():
        for row in rows_of:
            print(
                name,
                row["adapters"],
                *(f"{k} {row[k + '_ratio']:.2f} {row[k + '_range']}" for k in KEYS),
            )


if __name__ == "__main__":
    main()
