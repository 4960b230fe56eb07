"""Training step time of LoReFT, LoRA and pyreft in ratios to a bare frozen model, in one interleaved run.

    python experiments/speed/step.py --random --out step
    python experiments/speed/step.py --model FOLDER --pyreft-python pyreft-venv/bin/python --out step

Every variant is a fresh process (``worker.py``) with the same weights and batches; in each round each variant
trains one step while the others wait, in an order that rotates by one a round. Writes ``OUT.json`` (every
measurement) and ``OUT.md`` (a table a workload). Only ratios travel between machines.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from worker import PREFIX, SUFFIX, VARIANTS

log = logging.getLogger("speed")

HERE = Path(__file__).resolve().parent
# name -> rows, longest prompt, target tokens (the end-of-text token counts as one)
WORKLOADS = {
    "8 x (115 + 6)": (8, 115, 6),
    "8 x (115 + 48)": (8, 115, 48),
    "1 x (115 + 6)": (1, 115, 6),
    "1 x (115 + 48)": (1, 115, 48),
}
BATCHES = 4
SPREAD = 7  # prompts are up to this much shorter than the longest, as in a batch grouped by length
SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}


def make_batches(vocabulary: int, rows: int, longest: int, target: int) -> dict[str, Tensor]:
    """Draw batches of random tokens in the layout prompt | target, as ``i.name`` tensors for a file.

    Time does not depend on which tokens they are. pyreft gets columns: a slot for each position of P,
    (b, 2, N) for the prefix and the suffix group and (b, 1, 2N) for both together.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for index in range(BATCHES):
        padding = torch.randint(0, SPREAD + 1, (rows, 1), generator=generator)
        padding[0] = 0
        columns = torch.arange(longest + target)
        attention = (columns >= padding).long()  # (b, s)
        input_ids = torch.randint(3, vocabulary, attention.shape, generator=generator)
        first = padding + torch.arange(PREFIX)
        last = (longest - SUFFIX + torch.arange(SUFFIX)).expand(rows, -1)
        batch = {
            "input_ids": input_ids * attention,
            "attention_mask": attention,
            "position_ids": (attention.cumsum(-1) - 1).clamp(min=0),
            "labels": torch.where(columns >= longest, input_ids, -100),
            "prompt_mask": attention.bool() & (columns < longest),
            "boundary": torch.tensor(longest),
            "pyreft_locations.untied": torch.stack([first, last], dim=1),
            "pyreft_locations.tied": torch.cat([first, last], dim=1)[:, None],
        }
        tensors |= {f"{index}.{name}": tensor.contiguous() for name, tensor in batch.items()}
    return tensors


class Worker:
    """A variant in its own process; :meth:`ask` sends one request and waits for the answer."""

    def __init__(self, python: str, variant: str, model: str, batches: Path, threads: int) -> None:
        self.variant = variant
        path = os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")]))
        quiet = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [python, str(HERE / "worker.py"), variant, model, str(batches), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, **quiet, "PYTHONPATH": path},
        )

    def answer(self) -> dict[str, Any]:
        """Wait for the next answer.

        Raises:
            RuntimeError: if the process ended instead.
        """
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise RuntimeError(
                f"the worker {self.variant!r} ended with code {code}; its own message stands above"
            )
        return json.loads(line)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        self.process.stdin.write(json.dumps(request) + "\n")
        return self.answer()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def measure(
    workload: str, variants: list[str], model: str, vocabulary: int, args: argparse.Namespace
) -> list[dict]:
    """Time all variants on one workload; returns one record a variant."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        batches = Path(folder) / "batches.safetensors"
        save_file(make_batches(vocabulary, *WORKLOADS[workload]), batches)
        workers = []
        for variant in variants:  # one after the other: loading has the memory and the cores to itself
            python = args.pyreft_python if variant.startswith("pyreft") else sys.executable
            workers.append(stack.enter_context(Worker(python, variant, model, batches, args.threads)))
            workers[-1].answer()
        steps: dict[str, list[dict]] = {variant: [] for variant in variants}
        for number in range(args.warmup + args.rounds):
            turn = number % len(workers)
            for worker in workers[turn:] + workers[:turn]:
                steps[worker.variant].append(worker.ask({"step": number}))
            log.info("%s: round %d of %d", workload, number + 1, args.warmup + args.rounds)
        records = []
        for worker in workers:
            timed = steps[worker.variant][args.warmup :]
            records.append(
                {
                    "workload": workload,
                    "variant": worker.variant,
                    "first_loss": steps[worker.variant][0]["loss"],
                    "wall": [step["wall"] for step in timed],
                    "cpu": [step["cpu"] for step in timed],
                    **worker.ask({"report": True}),
                }
            )
        check_losses(records)
        return records


def check_losses(records: list[dict]) -> None:
    """Logits at the targets alone must give the loss of all logits: both variants start from the same seed.

    Raises:
        RuntimeError: if the first losses differ by more than rounding.
    """
    losses = {record["variant"]: record["first_loss"] for record in records}
    for name, loss in losses.items():
        full = losses.get(name.removesuffix(" target-only"), loss)
        if abs(loss - full) > 1e-3 * abs(full):
            raise RuntimeError(f"{name!r} starts at loss {loss}, the same with all logits at {full}")


def with_ratios(records: list[dict]) -> list[dict]:
    """Add the ratios to B: of the fastest round, of the median, and of the fastest in CPU time."""
    base = next(record for record in records if record["variant"] == "B")
    return [
        record
        | {
            "ratio_best": min(record["wall"]) / min(base["wall"]),
            "ratio_median": statistics.median(record["wall"]) / statistics.median(base["wall"]),
            "ratio_cpu": min(record["cpu"]) / min(base["cpu"]),
        }
        for record in records
    ]


def table(records: list[dict]) -> str:
    """Return a Markdown table of one workload."""
    lines = [
        f"## {records[0]['workload']}",
        "",
        "| variant | best / B | median / B | cpu / B | best s | median s | trainable | peak RSS MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in records:
        ratios = " | ".join(f"{r[key]:.2f}" for key in ("ratio_best", "ratio_median", "ratio_cpu"))
        times = f"{min(r['wall']):.4f} | {statistics.median(r['wall']):.4f}"
        size = f"{r['trainable_parameters']:,} | {r['peak_memory_bytes'] / 1e6:.0f}"
        lines.append(f"| {r['variant']} | {ratios} | {times} | {size} |")
    return "\n".join(lines)


def available(args: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """Return the variants to run and, for the others, why not.

    Raises:
        ValueError: if a variant asked for by name is unknown or cannot run.
    """
    reasons = {}
    if importlib.util.find_spec("peft") is None:
        reasons |= {name: "peft is not installed" for name in VARIANTS if name.startswith("lora")}
    if args.pyreft_python is None:
        reasons |= {name: "no --pyreft-python" for name in VARIANTS if name.startswith("pyreft")}
    wanted = args.variants or list(VARIANTS)
    for name in args.variants or []:
        if name not in VARIANTS:
            raise ValueError(f"unknown variant {name!r}; known are {', '.join(VARIANTS)}")
        if name in reasons:
            raise ValueError(f"the variant {name!r} cannot run: {reasons[name]}")
    chosen = [name for name in VARIANTS if name == "B" or (name in wanted and name not in reasons)]
    return chosen, {name: why for name, why in reasons.items() if name in wanted}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="folder of a Hugging Face causal model")
    source.add_argument("--random", action="store_true", help="random weights, shape of SmolLM2-135M")
    parser.add_argument("--pyreft-python", help="python of an environment with pyreft, see README.md")
    parser.add_argument(
        "--variants", nargs="+", metavar="NAME", help=f"of {', '.join(VARIANTS)}; B always runs"
    )
    parser.add_argument("--workloads", nargs="+", metavar="NAME", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=HERE / "step", help="writes OUT.json and OUT.md")
    return parser.parse_args()


def main() -> None:
    """Measure every workload and write both files."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = arguments()
    variants, left_out = available(args)
    with tempfile.TemporaryDirectory() as folder:
        if args.random:
            torch.manual_seed(0)
            LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M)).save_pretrained(folder)
        model = folder if args.random else str(args.model)
        vocabulary = AutoConfig.from_pretrained(model, local_files_only=True).vocab_size
        results = [with_ratios(measure(name, variants, model, vocabulary, args)) for name in args.workloads]
    header = {
        "question": "training step time, in ratios to B",
        "model": "random weights, shape of SmolLM2-135M" if args.random else args.model.resolve().name,
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "threads": args.threads,
        "rounds": args.rounds,
        "warmup": args.warmup,
        "load_after": os.getloadavg()[0],
        "left_out": left_out,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    records = [record for workload in results for record in workload]
    args.out.with_suffix(".json").write_text(json.dumps({**header, "records": records}, indent=1) + "\n")
    facts = ", ".join(
        f"{key} {header[key]}" for key in ("model", "date", "torch", "threads", "rounds", "warmup")
    )
    notes = [f"Not measured: {name} ({why})." for name, why in left_out.items()]
    text = "\n\n".join([f"# Step time\n\n{facts}", *notes, *map(table, results)])
    args.out.with_suffix(".md").write_text(text + "\n")
    log.info("wrote %s and %s", args.out.with_suffix(".json").name, args.out.with_suffix(".md").name)


if __name__ == "__main__":
    main()
