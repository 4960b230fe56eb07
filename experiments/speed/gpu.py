"""The training step on a CUDA device: time, peak memory, kernels, and how near it comes to the device's limits.

    make bench-gpu
    python experiments/speed/gpu.py --shapes 135M 1B --pyreft-python pyreft-venv/bin/python --out gpu

Random weights of SmolLM2-135M's shape and of Llamas of 1B and 8B parameters, bf16 base, float32 edits, 8 prompts of up
to 115 tokens with 6 target tokens. Variants are those of ``worker.py``, two alive at a time and taking turns. A turn is
``--steps`` training steps between two CUDA events. Beside it stand the kernels that a step starts (torch.profiler), its
floating-point operations (torch.utils.flop_counter), and the speed of one large product and of one large copy.

Without a CUDA device it stops and says so; ``--device cpu --shapes tiny`` runs everything but the events.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import logging
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from figures import Figure, add_arguments, figure, header, number, ratio, seconds_table, write
from models import LLAMA_1B, LLAMA_8B, SMOLLM2_135M
from processes import Worker, interleaved, is_worker, peak_memory_bytes, serve
from safetensors.torch import save_file
from step import SHORT, WORKLOADS, make_batches
from transformers import AutoModelForCausalLM, LlamaConfig
from worker import VARIANTS, Step, frozen, load_batches

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
        memory: goal of the ratio of peak memory, below over above where higher is better.
    """

    what: str
    above: str
    below: str
    goal: float | None = None
    better: str = "lower"
    memory: float | None = None


OURS = "reft target-only bf16"
PAIRS = (
    Pair("step, target-only logits / bare step, target-only logits", OURS, "B target-only bf16", 1.02),
    Pair("step, full logits / bare step (B)", "reft bf16", "B bf16"),
    Pair("step, target-only logits / B", OURS, "B bf16", memory=0.85),
    Pair("step of pyreft, tied / ours", "pyreft tied bf16", OURS, better="higher", memory=1 / 0.74),
    Pair("step of LoRA r=8 / ours", "lora r8 bf16", OURS, better="higher"),
    Pair("step of LoRA r=32 / ours", "lora r32 bf16", OURS, better="higher", memory=1 / 0.6),
)


# --- inside the process of a variant ------------------------------------------------------------------------------


class DeviceStep:
    """Some steps of a variant on a device a call, timed there.

    Args:
        name: of the variant.
        shape: arguments of ``LlamaConfig``.
        device: of torch.
        batch_file: as ``step.py`` writes it.
        steps: a call.
    """

    def __init__(self, name: str, *, shape: dict[str, Any], device: str, batch_file: str, steps: int) -> None:
        variant = VARIANTS[name]
        self.device, self.steps = torch.device(device), steps
        with self.device:
            model = AutoModelForCausalLM.from_config(
                LlamaConfig(**shape), dtype=getattr(torch, variant.dtype)
            )
        self.step = Step(variant, frozen(model), load_batches(batch_file))
        self.report = self._report

    def __call__(self, number: int) -> dict[str, float]:
        """Train ``steps`` steps; seconds a step."""
        first = number * self.steps
        cpu = time.process_time()
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for i in range(self.steps):
                loss = self.step.train(first + i)
            end.record()
            torch.cuda.synchronize()
            wall = start.elapsed_time(end) / 1000
        else:
            wall = time.perf_counter()
            for i in range(self.steps):
                loss = self.step.train(first + i)
            wall = time.perf_counter() - wall
        spent = time.process_time() - cpu
        return {"wall": wall / self.steps, "cpu": spent / self.steps, "loss": float(loss)}

    def _report(self) -> dict[str, Any]:
        """Memory first: the profiler needs some of its own."""
        cuda = self.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated() if cuda else peak_memory_bytes()
        return {
            "peak_memory_bytes": memory,
            "kernels": count_kernels(self.step, self.device),
            "flops": count_flops(self.step),
            **self.step.report,
        }


def count_kernels(step: Step, device: torch.device) -> int:
    """Return how many kernels a step starts on its device; on a CPU, how many ATen operations it calls."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        step.train(0)
        if cuda:
            torch.cuda.synchronize()
    if cuda:
        names = [e.name for e in profiler.events() if e.device_type == DeviceType.CUDA]
        return sum(not name.startswith(("Memcpy", "Memset")) for name in names)
    return sum(event.name.startswith("aten::") for event in profiler.events())


def count_flops(step: Step) -> int:
    """Return the floating-point operations of the products and attentions of a step."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step.train(0)
    return counter.get_total_flops()


def limits(*, device: str, **_: Any):
    """Measure what the device can do: a large bf16 product and a large copy."""
    place = torch.device(device)
    cuda = place.type == "cuda"
    size = 8192 if cuda else 256
    a, b = (torch.randn(size, size, device=place, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**28 if cuda else 2**20, device=place, dtype=torch.float32)
    target = torch.empty_like(source)

    def seconds(work, times: int) -> float:
        work()
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            work()
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / times

    def run(number: int) -> dict[str, float]:
        return {
            "flops_per_second": 2 * size**3 / seconds(lambda: a @ b, 20),
            "bytes_per_second": 2 * source.nbytes / seconds(lambda: target.copy_(source), 20),
        }

    return run


# --- the table ----------------------------------------------------------------------------------------------------


def figures_of(shape: str, pair: Pair, records: dict[str, dict[str, Any]], kernels: str) -> list[Figure]:
    """Return the figures of one pair: time, memory, and for the bare model the kernels added."""
    above, below = records[pair.above], records[pair.below]
    found = [ratio(f"{shape}: {pair.what}", above["wall"], below["wall"], goal=pair.goal, better=pair.better)]
    memory = above["peak_memory_bytes"] / below["peak_memory_bytes"]
    what = f"{shape}: peak memory, {pair.what}"
    found.append(figure(what, memory, goal=pair.memory, better=pair.better))
    if pair.goal is not None:
        added = above["kernels"] - below["kernels"]
        what = f"{shape}: {kernels} a step added by the interventions"
        found.append(figure(what, added, unit=kernels, note=f"{below['kernels']:,} without them"))
    return found


def roofline(
    shape: str, record: dict[str, Any], device_limits: dict[str, float], weights: int
) -> list[Figure]:
    """Return how much of the device a step uses, and what bounds it.

    A step reads every frozen weight twice, forward and backward; activations are left out.
    """
    seconds = min(record["wall"])
    by_products = record["flops"] / device_limits["flops_per_second"]
    by_memory = 2 * weights / device_limits["bytes_per_second"]
    bound = "products" if by_products > by_memory else "reading weights"
    return [
        figure(f"{shape}: FLOP/s of our step / FLOP/s of a large product", by_products / seconds, better="higher"),
        figure(
            f"{shape}: shortest possible step / our step", max(by_products, by_memory) / seconds, better="higher",
            note=f"bound by {bound}: products {number(1000 * by_products)} ms, weights {number(1000 * by_memory)} ms",
        ),
    ]  # fmt: skip


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


def measure(
    name: str, args: argparse.Namespace, found: dict[str, float], missing: dict[str, str]
) -> tuple[list[Figure], list[dict[str, Any]], str]:
    """Run the pairs of one shape; returns figures, records and a table a pair."""
    shape = SHAPES[name]
    kernels = "kernels" if torch.device(args.device).type == "cuda" else "operations"
    figures, records, tables = [], [], []
    with tempfile.TemporaryDirectory() as work:
        batches = Path(work) / "batches.safetensors"
        save_file(make_batches(shape["vocab_size"], *WORKLOADS[SHORT]), batches)
        settings = {"shape": shape, "device": args.device, "batch_file": str(batches), "steps": args.steps}
        for pair in PAIRS:
            reason = missing.get(VARIANTS[pair.above].needs)
            if reason:
                log.info("%s: %s is left out: %s", name, pair.above, reason)
                continue
            variants = [pair.below, pair.above]
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
            figures += figures_of(name, pair, given, kernels)
            if pair.goal is not None:
                figures += roofline(name, given[pair.above], found, weight_bytes(shape))
            records += [{"shape": name, "pair": pair.what, "variant": v, **r} for v, r in given.items()]
            tables.append(f"## {name}: {pair.what}\n\n{seconds_table(given, pair.below)}")
    return figures, records, "\n\n".join(tables)


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
                        help=f"of {', '.join(SHAPES)}; 8B needs 40 GB")  # fmt: skip
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=5, help="training steps a turn")
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
    if importlib.util.find_spec("peft") is None:
        missing["peft"] = "peft is not installed"
    found = device_limits(args)
    figures, records, tables = [], [], []
    for name in args.shapes:
        more, measured, text = measure(name, args, found, missing)
        figures += more
        records += measured
        tables.append(text)
    device = torch.cuda.get_device_name(args.device) if cuda else args.device
    facts = header(
        "Training step on a device", args, device=device, torch=torch.__version__, steps=args.steps, workload=SHORT,
        product_tflops=round(found["flops_per_second"] / 1e12, 2), copy_gb_s=round(found["bytes_per_second"] / 1e9, 1),
        left_out=missing,
    )  # fmt: skip
    write(args.out, facts, records, figures, "\n\n".join(tables))
    log.info("wrote %s and %s", args.out.with_suffix(".json").name, args.out.with_suffix(".md").name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
