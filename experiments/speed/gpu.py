"""The training step on a CUDA device: time, peak memory, kernels, and how near it comes to the device's limits.

    make bench-gpu
    python experiments/speed/gpu.py --shapes 135M 1B --pyreft-python pyreft-venv/bin/python --out gpu

Random weights of SmolLM2-135M's shape and of Llamas of 1B and 8B parameters, bf16 base, float32 edits, 8 prompts of up
to 115 tokens with 6 target tokens. Variants are those of ``worker.py``, two alive at a time and taking turns. A turn is
``--steps`` training steps between two CUDA events. Next to it stand the kernels and copies that a step starts and how
long they take (torch.profiler), its floating-point operations (torch.utils.flop_counter), and the speed of one large
product and of one large copy. What the interventions add is counted against a bare model whose gradients pass the same
blocks. The files are written after every pair; a pair that fails is left out with its reason, the others go on, and the
status is 1.

Without a CUDA device it stops and says so; ``--device cpu --shapes tiny`` runs everything but the events.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import logging
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from device_step import DeviceStep, limits
from figures import Figure, add_arguments, figure, header, number, ratio, seconds_table, write
from models import LLAMA_1B, LLAMA_8B, SMOLLM2_135M
from processes import Worker, interleaved, is_worker, serve
from safetensors.torch import save_file
from step import SHORT, WORKLOADS, make_batches
from transformers import AutoModelForCausalLM, LlamaConfig
from worker import VARIANTS

log = logging.getLogger("speed")

HERE = Path(__file__).resolve().parent
TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": 256,
}
SHAPES = {"135M": SMOLLM2_135M, "1B": LLAMA_1B, "8B": LLAMA_8B, "tiny": TINY}
LIMITS = "limits of the device"


@dataclass(frozen=True)
class Pair:
    """Two variants that take turns, and what their ratio is called.

    Args:
        what: names the figure of time; the memory's is named after it.
        above: a variant of ``worker.py``.
        below: another.
        goal: of the ratio of times.
        better: of both ratios.
        memory: goal of the ratio of peak memory, below over above where higher is better; of the 135M shape, for
            which it was set: the larger the model, the more of the memory is its weights, on both sides.
        added: whether what the one starts beyond the other is what the interventions add.
    """

    what: str
    above: str
    below: str
    goal: float | None = None
    better: str = "lower"
    memory: float | None = None
    added: bool = False


OURS = "reft target-only bf16"
PAIRS = (
    Pair("step, target-only logits / bare step, target-only logits", OURS, "B target-only bf16", 1.02),
    Pair(
        "step, target-only logits / bare step behind the first block, target-only logits",
        OURS, "B behind the first block, target-only bf16", added=True,
    ),
    Pair("step, full logits / bare step (B)", "reft bf16", "B bf16"),
    Pair("step, target-only logits / B", OURS, "B bf16", memory=0.85),
    Pair("step of pyreft, tied / ours", "pyreft tied bf16", OURS, better="higher", memory=1 / 0.74),
    Pair("step of LoRA r=8 / ours", "lora r8 bf16", OURS, better="higher"),
    Pair("step of LoRA r=32 / ours", "lora r32 bf16", OURS, better="higher", memory=1 / 0.6),
)  # fmt: skip


# --- the table ----------------------------------------------------------------------------------------------------


def figures_of(shape: str, pair: Pair, records: dict[str, dict[str, Any]], kernels: str) -> list[Figure]:
    """Return the figures of one pair: time, memory, and what the interventions start."""
    above, below = records[pair.above], records[pair.below]
    found = [ratio(f"{shape}: {pair.what}", above["wall"], below["wall"], goal=pair.goal, better=pair.better)]
    memory = above["peak_memory_bytes"] / below["peak_memory_bytes"]
    goal = pair.memory if shape == "135M" else None
    found.append(figure(f"{shape}: peak memory, {pair.what}", memory, goal=goal, better=pair.better))
    if pair.added:
        added = above["kernels"] - below["kernels"]
        what = f"{shape}: {kernels} a step added by the interventions"
        found.append(figure(what, added, unit=kernels, note=f"{below['kernels']:,} without them"))
    return found


def roofline(
    shape: str, record: dict[str, Any], device_limits: dict[str, float], weights: int
) -> list[Figure]:
    """Return how much of the device a step uses, and what bounds it.

    A step reads every frozen weight twice, forward and backward; activations are left out. Where the device works for
    less than the whole step, the processor that starts its kernels is what it waits for.
    """
    seconds = statistics.median(record["wall"])
    by_products = record["flops"] / device_limits["flops_per_second"]
    by_memory = 2 * weights / device_limits["bytes_per_second"]
    bound = "products" if by_products > by_memory else "reading weights"
    found = [
        figure(f"{shape}: FLOP/s of our step / FLOP/s of a large product", by_products / seconds, better="higher"),
        figure(
            f"{shape}: shortest possible step / our step", max(by_products, by_memory) / seconds, better="higher",
            note=f"bound by {bound}: products {number(1000 * by_products)} ms, weights {number(1000 * by_memory)} ms",
        ),
    ]  # fmt: skip
    if record["busy"] is not None:
        what = f"{shape}: time in which the device works / our step"
        note = f"{record['kernels']:,} kernels and copies of {number(1000 * record['busy'])} ms together"
        found.append(figure(what, record["busy"] / seconds, better="higher", note=note))
    return found


def weight_bytes(shape: dict[str, Any]) -> int:
    """Return the bytes of a model's weights in bf16, the embedding left out unless it is the head too."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    total = sum(parameter.nbytes for parameter in model.parameters())
    return total - (0 if shape["tie_word_embeddings"] else model.get_input_embeddings().weight.nbytes)


def device_limits(args: argparse.Namespace) -> dict[str, float]:
    """Return the speed of products and of copies, the best of three."""
    with Worker(__file__, LIMITS, {"device": args.device}, args.threads) as worker:
        found = [worker.ask({"run": i}) for i in range(3)]
    return {key: max(one[key] for one in found) for key in ("flops_per_second", "bytes_per_second")}


@dataclass
class Found:
    """What one pair of variants gave on one shape; why it gave nothing."""

    figures: list[Figure] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    table: str = ""
    left_out: dict[str, str] = field(default_factory=dict)


def measure(
    name: str, args: argparse.Namespace, found: dict[str, float], missing: dict[str, str]
) -> Iterator[Found]:
    """Run the pairs of one shape, one after the other."""
    shape = SHAPES[name]
    kernels = "kernels and copies" if torch.device(args.device).type == "cuda" else "operations"
    with tempfile.TemporaryDirectory() as work:
        batches = Path(work) / "batches.safetensors"
        save_file(make_batches(shape["vocab_size"], *WORKLOADS[SHORT]), batches)
        settings = {"shape": shape, "device": args.device, "batch_file": str(batches), "steps": args.steps}
        for pair in PAIRS:
            if VARIANTS[pair.above].needs in missing:
                continue
            variants = [pair.below, pair.above]
            try:
                given = interleaved(
                    __file__,
                    variants,
                    settings,
                    rounds=args.rounds,
                    warmup=args.warmup,
                    threads=args.threads,
                    pythons={v: args.pyreft_python for v in variants if VARIANTS[v].needs == "pyreft"},
                    name=f"{name}, {pair.above} and {pair.below}",
                )
            except (RuntimeError, OSError) as error:  # out of memory, a peer that fails: the others go on
                log.warning("%s: %s is left out: %s", name, pair.what, error)
                yield Found(left_out={f"{name}: {pair.what}": str(error)})
                continue
            figures = figures_of(name, pair, given, kernels)
            if pair.goal is not None:
                figures += roofline(name, given[pair.above], found, weight_bytes(shape))
            records = [{"shape": name, "pair": pair.what, "variant": v, **r} for v, r in given.items()]
            yield Found(figures, records, f"## {name}: {pair.what}\n\n{seconds_table(given, pair.below)}")


def why_not(python: str) -> str | None:
    """Return why a peer's environment cannot be measured on a CUDA device, or None."""
    ask = "import torch; print(torch.__version__.split('+')[0], torch.cuda.is_available())"
    try:
        done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"its python cannot say what its torch finds: {error}"
    version, sees = done.stdout.splitlines()[-1].split()
    if sees != "True":
        return f"its torch {version} finds no CUDA device"
    here = torch.__version__.split("+")[0]
    return None if version == here else f"its torch is {version}, here it is {here}"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, HERE / "gpu", rounds=12, warmup=3, model=False, peers=("pyreft",))
    parser.add_argument(
        "--make-peers", action="store_true", help="install pyreft into .bench/, as bench.py does"
    )
    parser.add_argument("--shapes", nargs="+", metavar="NAME", choices=SHAPES, default=["135M", "1B", "8B"],
                        help=f"of {', '.join(SHAPES)}; 8B needs 64 GB")  # fmt: skip
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=20, help="training steps a turn")
    return parser.parse_args()


def main() -> int:
    """Measure every shape and write both files."""
    if is_worker():
        serve({name: functools.partial(DeviceStep, name) for name in VARIANTS} | {LIMITS: limits})
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = arguments()
    cuda = torch.device(args.device).type == "cuda"
    if cuda and not torch.cuda.is_available():
        log.error(
            "no CUDA device: nothing is measured. --device cpu --shapes tiny runs the logic without one."
        )
        return 2
    missing = {}
    if args.make_peers and args.pyreft_python is None:
        from bench import find_pythons

        pythons, missing = find_pythons({"pyreft"}, {})
        args.pyreft_python = pythons.get("pyreft")
    elif args.pyreft_python is None:
        missing["pyreft"] = "no --pyreft-python"
    if cuda and args.pyreft_python and (reason := why_not(args.pyreft_python)):
        missing["pyreft"] = reason
    if importlib.util.find_spec("peft") is None:
        missing["peft"] = "peft is not installed"
    found = device_limits(args)
    done: list[Found] = []
    for name in args.shapes:
        for pair in measure(name, args, found, missing):
            done.append(pair)
            write_all(args, found, missing, done)
    log.info("wrote %s and %s", args.out.with_suffix(".json").name, args.out.with_suffix(".md").name)
    return 1 if any(pair.left_out for pair in done) else 0


def write_all(
    args: argparse.Namespace, found: dict[str, float], missing: dict[str, str], done: list[Found]
) -> None:
    """Write both files with what there is so far."""
    cuda = torch.device(args.device).type == "cuda"
    device = torch.cuda.get_device_name(args.device) if cuda else args.device
    left_out = missing | {what: why for pair in done for what, why in pair.left_out.items()}
    facts = header(
        "Training step on a device", args, device=device, torch=torch.__version__, steps=args.steps, workload=SHORT,
        product_tflops=round(found["flops_per_second"] / 1e12, 2), copy_gb_s=round(found["bytes_per_second"] / 1e9, 1),
        left_out=left_out,
    )  # fmt: skip
    figures = [one for pair in done for one in pair.figures]
    records = [one for pair in done for one in pair.records]
    write(args.out, facts, records, figures, "\n\n".join(pair.table for pair in done if pair.table))


if __name__ == "__main__":
    sys.exit(main())
