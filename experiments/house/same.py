"""What must stay the same while the code moves: short runs of every kind, as the command line starts them.

    python experiments/house/same.py --out before.json             # on the tree before
    python experiments/house/same.py --out after.json --against before.json

A run is a few steps of a random model on invented rows. Its losses by step, scores, predictions, parameter counts
and the size of its adapter are compared to the last bit; what differs is printed, and the exit status is 1.
Only the commands are used, so that the script runs on trees whose insides differ.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
COMMANDS = Path(sys.executable).parent
WORDS = ("zorb", "fenk", "mivle", "varr", "tull", "snide", "quab", "olp")

SHORT = [
    "model=tiny_random", "trainer=cpu", "trainer.max_epochs=2", "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false", "data.source=local", "data.validation_size=6", "data.batch_size=3",
    "data.eval_batch_size=4", "decoding.max_new_tokens=3", "intervention.positions=f2+l2", "intervention.rank=2",
    "optimizer.lr=5e-3",
]  # fmt: skip
NO_SETTINGS = [o for o in SHORT if not o.startswith("intervention.")]
ENCODER = ["++model.config.model_type=roberta", "++model.config.pad_token_id=0"]
GLUE = [
    *(o for o in SHORT if not o.startswith(("data.validation_size", "decoding."))), *ENCODER,
    f"data.path={FIXTURES / 'glue'}", "intervention.positions=f2", "data.limit_train=24",
]  # fmt: skip

BOOLQ = ["data=boolq", "data.path=ROWS"]
RUNS: dict[str, list[str]] = {
    "loreft": [*SHORT, *BOOLQ, "evaluate_base=true"],
    "loreft_bfloat16": [*SHORT, *BOOLQ, "model.dtype=bfloat16"],
    "loreft_suffix": [*SHORT, *BOOLQ, "intervention.positions=l2"],
    "loreft_suffix_kept": [*SHORT, *BOOLQ, "intervention.positions=l2", "kept.limit_gb=0.1"],
    "loreft_last_layer": [*SHORT, *BOOLQ, "intervention.layers=[1]", "kept.limit_gb=0.1"],
    "loreft_accumulated": [*SHORT, *BOOLQ, "trainer.accumulate_grad_batches=2", "optimizer.weight_decay=0.1"],
    "direft_group": [*SHORT, *BOOLQ, "intervention=direft", "intervention.tied=group", "intervention.dropout=0.1"],
    "red_all": [
        *(o for o in SHORT if "rank" not in o), *BOOLQ, "intervention=red", "intervention.positions=all",
    ],
    "checkpointing": [*SHORT, *BOOLQ, "model.gradient_checkpointing=true"],
    "lora": [*NO_SETTINGS, *BOOLQ, "intervention=peft/lora"],
    "prefix_tuning": [*NO_SETTINGS, *BOOLQ, "intervention=peft/prefix_tuning"],
    "bitfit": [*NO_SETTINGS, "++model.config.model_type=gpt2", *BOOLQ,
               "intervention=bitfit"],
    "full": [*NO_SETTINGS, *BOOLQ, "intervention=full", "optimizer.lr=1e-3"],
    "frozen": [*NO_SETTINGS, *BOOLQ, "intervention=frozen"],
    "loreft_lora": [*SHORT, *BOOLQ, "intervention=loreft_lora"],
    "glue_stsb": [*GLUE, "data=glue_stsb"],
    "glue_mrpc_head": [
        *(o for o in GLUE if not o.startswith("intervention.")), "data=glue_mrpc", "intervention=none",
    ],
    "arithmetic": [
        *SHORT, "data=arithmetic", f"data.path={FIXTURES / 'arithmetic' / 'rendered'}", "data.train_tasks=null",
        f"data.mixture={FIXTURES / 'arithmetic' / 'mixture.json'}", "data.validation_size=2",
    ],
    "custom": [
        *SHORT, "data=custom", f"data.path={FIXTURES / 'custom' / 'rows.csv'}", "data.prompt=question",
        "data.target=reply", "data.validation_size=2",
    ],
    "squad": [*SHORT, "data=squad", f"data.path={FIXTURES / 'reading'}", "data.validation_size=2"],
    "two_processes": [*SHORT, *BOOLQ, "trainer.devices=2", "trainer.strategy=ddp"],
}  # fmt: skip


def write_rows(folder: Path, train: int = 24, test: int = 6) -> Path:
    """Write invented yes/no rows in the layout of LLM-Adapters."""
    (folder / "boolq").mkdir(parents=True)
    for split, count in (("train", train), ("test", test)):
        rows = []
        for i in range(count):
            rng = random.Random(f"{split} {i}")
            gold = rng.choice(("true", "false"))
            question = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 6)))
            rows.append(
                {
                    "instruction": f"is {question} {split} {i} kept?\n\nAnswer format: true/false",
                    "input": "", "output": f"the correct answer is {gold}", "answer": gold,
                }
            )  # fmt: skip
        (folder / "boolq" / f"{split}.json").write_text(json.dumps(rows))
    return folder


def command(name: str, *arguments: str) -> list[str]:
    return [str(COMMANDS / name), *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "OMP_WAIT_POLICY": "PASSIVE"}


def train(folder: Path, overrides: list[str], place: Path) -> str | None:
    """Run to its end; return what it printed if it failed."""
    overrides = [o.replace("ROWS", str(place)) for o in overrides]
    done = subprocess.run(
        command("reft-train", *overrides, f"hydra.run.dir={folder}"), env=environment(), cwd=folder.parent,
        capture_output=True, text=True,
    )  # fmt: skip
    return None if done.returncode == 0 else done.stderr[-2000:]


def killed_and_resumed(folder: Path, overrides: list[str], place: Path) -> str | None:
    """Kill a run after its first epoch, and resume it."""
    overrides = [o.replace("ROWS", str(place)) for o in overrides]
    started = subprocess.Popen(
        command("reft-train", *overrides, f"hydra.run.dir={folder}"),
        env=environment(), cwd=folder.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    last = folder / "checkpoints" / "last.ckpt"
    while not last.is_file() and started.poll() is None:
        time.sleep(0.02)
    if started.poll() is None:
        os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    done = subprocess.run(
        command("reft-train", f"resume={folder}"),
        env=environment(),
        cwd=folder.parent,
        capture_output=True,
        text=True,
    )
    return None if done.returncode == 0 else done.stderr[-2000:]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def predictions(path: Path) -> list[dict]:
    """Rows with their columns in order: a file may gain columns, and what stood in it must stay."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def logged(folder: Path, column: str) -> dict[str, str]:
    found = {}
    for part in sorted(folder.glob("csv*/metrics.csv")):
        with open(part, newline="") as file:
            found |= {row["step"]: row[column] for row in csv.DictReader(file) if row.get(column)}
    return found


def observed(folder: Path) -> dict:
    """What a finished run left."""
    results = json.loads((folder / "results.json").read_text())
    names = (
        "trainable_parameters",
        "base_parameters",
        "head_parameters",
        "steps",
        "tokens",
        "monitor",
        "best_step",
    )
    return {
        "results": {name: results.get(name) for name in names},
        "metrics": {k: v for k, v in sorted(results["metrics"].items()) if "second" not in k},
        "counts": results["counts"],
        "losses": logged(folder, "train/loss"),
        "predictions": {p.stem: predictions(p) for p in sorted(folder.glob("predictions/*.jsonl"))},
        "adapter": {p.name: p.stat().st_size for p in sorted((folder / "adapter").rglob("*.safetensors"))},
    }


def search(folder: Path, place: Path) -> dict:
    """Two methods, two trials each, one winner each."""
    space = "{intervention.rank: {choice: [1, 2]}}"
    base = "\n".join(f"  - {o.replace('ROWS', str(place))}" for o in [*SHORT, *BOOLQ] if "rank" not in o)
    file = folder.parent / "search" / "two.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(
        "# Command:  reft-search search=two\n# Paper:    none\n# Table:    none\n# Expected: nothing\n"
        f"base:\n{base}\nmethods:\n"
        f"  loreft: {{overrides: [intervention=loreft], space: {space}}}\n"
        f"  direft: {{overrides: [intervention=direft], space: {space}}}\n"
        "budget: {unit: trials, amount: 2}\nsampler: grid\nseeds: [42]\n"
    )
    done = subprocess.run(
        command("reft-search", f"search={file}", f"folder={folder}"), env=environment(), cwd=folder.parent,
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        return {"failed": done.stderr[-2000:] + done.stdout[-1000:]}
    summary = json.loads((folder / "summary.json").read_text())
    winners = sorted(p.parent for p in folder.rglob("winners/**/results.json"))
    return {
        "methods": sorted(summary["methods"]),
        "winners": [observed(winner)["metrics"] for winner in winners],
    }


def differences(before, after, where: str = "") -> list[str]:
    """List where two observations differ; keys that only `after` has are no difference."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            line
            for key, value in before.items()
            for line in (
                differences(value, after[key], f"{where}/{key}") if key in after else [f"{where}/{key}: gone"]
            )
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [
            line
            for i, (b, a) in enumerate(zip(before, after, strict=True))
            for line in differences(b, a, f"{where}[{i}]")
        ]
    return [] if before == after else [f"{where}: {before!r} before, {after!r} after"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("--against", type=Path, help="an earlier file to compare with")
    parser.add_argument("--only", nargs="*", help="names of runs")
    options = parser.parse_args()
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as scratch:
        place = write_rows(Path(scratch) / "rows")
        for name, overrides in RUNS.items():
            if options.only and name not in options.only:
                continue
            folder = Path(scratch) / name
            error = train(folder, overrides, place)
            found[name] = {"failed": error} if error else observed(folder)
            print(name, "failed: " + error if error else "ok", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
        if not options.only or "resumed" in options.only:
            folder = Path(scratch) / "resumed"
            error = killed_and_resumed(folder, RUNS["loreft"], place)
            found["resumed"] = {"failed": error} if error else observed(folder)
            print("resumed", "failed: " + error if error else "ok", flush=True)
        if not options.only or "search" in options.only:
            found["search"] = search(Path(scratch) / "study", place)
            print("search", found["search"].get("failed", "ok"), flush=True)
    options.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    failed = [name for name, values in found.items() if "failed" in values]
    lines = [f"{name}: failed" for name in failed]
    if options.against:
        before = json.loads(options.against.read_text())
        lines += differences({k: v for k, v in before.items() if k in found}, found)
    print("\n".join(lines) or "nothing differs")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
