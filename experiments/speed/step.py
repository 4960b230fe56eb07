"""Training step time and memory of LoReFT, LoRA, pyreft and adapters in ratios to a bare frozen model.

    python experiments/speed/step.py --random --out step
    python experiments/speed/step.py --model FOLDER --pyreft-python pyreft-venv/bin/python --out step

Every variant (``worker.py``) is a process with the same weights and batches, started ``--launches`` times; in each
round each variant of a group trains one step while the others wait, in an order that rotates by one a round. All
variants at once would not fit into memory: they run in groups, B in each. Only ratios travel between machines.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import logging
import statistics
import tempfile
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from figures import Figure, add_arguments, figure, header, ratio, seconds_table, write
from models import model_folder, vocabulary_of
from processes import interleaved, is_worker, serve
from safetensors.torch import save_file
from torch import Tensor
from worker import PREFIX, SUFFIX, VARIANTS, load_step

log = logging.getLogger("speed")

HERE = Path(__file__).resolve().parent
# name -> rows, longest prompt, target tokens (the end-of-text token counts as one)
WORKLOADS = {
    "8 x (115 + 6)": (8, 115, 6),
    "8 x (115 + 48)": (8, 115, 48),
    "1 x (115 + 6)": (1, 115, 6),
}
SHORT, LONG, SINGLE = WORKLOADS
BATCHES = 4
LAUNCHES = 8
SPREAD = 7  # prompts are up to this much shorter than the longest, as in a batch grouped by length

# group -> the workloads it runs on, and its variants; B comes first in each
GROUPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "float32": (
        (SHORT, LONG, SINGLE),
        ("B", "A", "reft", "reft untied", "reft target-only", "pyreft tied", "pyreft untied"),
    ),
    "peers": (
        (SHORT, LONG, SINGLE),
        ("B", "reft target-only", "lora r8", "lora r32", "adapters loreft"),
    ),
    "suffix": (
        (SHORT,),
        (
            "B",
            "reft l7 target-only",
            "reft l7 split",
            "reft l1 split",
            "reft l7 kept",
            "reft l1 kept",
            "reft middle layer l1 target-only",
            "reft middle layer kept",
        ),
    ),
    "onednn": ((SHORT,), ("B", "B onednn", "reft target-only", "reft target-only onednn")),
    "bf16": (
        (SHORT,),
        (
            "B",
            "B bf16",
            "reft bf16",
            "reft target-only bf16",
            "lora r8 bf16",
            "lora r32 bf16",
            "pyreft tied bf16",
        ),
    ),
}
# groups in which something is kept over epochs: every batch is seen once before a step counts
KEEPING = ("suffix",)


@dataclass(frozen=True)
class Goal:
    """A figure of the table: ``above`` over ``below``, in time or in peak memory.

    Args:
        what: names the figure.
        group: both variants are in it.
        above: a variant.
        below: a variant.
        goal: to reach, or None for a figure that is only reported.
        better: ``lower`` or ``higher``.
        workload: a name of ``WORKLOADS``.
        memory: peak memory instead of time.
    """

    what: str
    group: str
    above: str
    below: str
    goal: float | None = None
    better: str = "lower"
    workload: str = SHORT
    memory: bool = False


OURS = "reft target-only"
OURS_BF16 = "reft target-only bf16"
GOALS = (
    Goal("training step, f7+l7, target-only, short targets / B", "float32", OURS, "B", 0.78),
    Goal("the same, oneDNN products / B (MKL)", "onednn", f"{OURS} onednn", "B", 0.55),
    Goal("the same, bf16 base / B (float32)", "bf16", OURS_BF16, "B", 0.36),
    Goal("training step, full logits, batch 8 / B", "float32", "reft", "B", 1.02),
    Goal("training step, full logits, batch 1 / B", "float32", "reft", "B", 1.10, workload=SINGLE),
    Goal("training step, tied=group, full logits, batch 8 / B", "float32", "reft untied", "B"),
    Goal("forward alone / B", "float32", "A", "B"),
    Goal("training step of pyreft, tied / ours", "float32", "pyreft tied", OURS, 1.4, "higher"),
    Goal("training step of pyreft, untied / ours", "float32", "pyreft untied", OURS, 1.55, "higher"),
    Goal("training step of LoRA r=32 / ours", "peers", "lora r32", OURS, 1.45, "higher"),
    Goal("training step of LoRA r=8 / ours", "peers", "lora r8", OURS, 1.3, "higher"),
    Goal("training step of adapters / ours", "peers", "adapters loreft", OURS, None, "higher"),
    Goal("training step of pyreft, tied, bf16 / ours, bf16", "bf16", "pyreft tied bf16", OURS_BF16, 1.4, "higher"),
    Goal("training step of LoRA r=32, bf16 / ours, bf16", "bf16", "lora r32 bf16", OURS_BF16, 1.45, "higher"),
    Goal("training step of LoRA r=8, bf16 / ours, bf16", "bf16", "lora r8 bf16", OURS_BF16, 1.3, "higher"),
    Goal("training step, 48 target tokens / B", "float32", OURS, "B", workload=LONG),
    Goal("step of pyreft, tied, 48 target tokens / ours", "float32", "pyreft tied", OURS, None, "higher", LONG),
    Goal("step of LoRA r=32, 48 target tokens / ours", "peers", "lora r32", OURS, None, "higher", LONG),
    Goal("step of pyreft, tied, batch 1 / ours", "float32", "pyreft tied", OURS, None, "higher", SINGLE),
    Goal("training step, l7, constant prefix not split off / B", "suffix", "reft l7 target-only", "B"),
    Goal("training step, l7 / B", "suffix", "reft l7 split", "B", 0.5),
    Goal("training step, l1 / B", "suffix", "reft l1 split", "B", 0.5),
    Goal("training step, l7, constant prefix kept / B", "suffix", "reft l7 kept", "B", 0.26),
    Goal("training step, l1, constant prefix kept / B", "suffix", "reft l1 kept", "B", 0.26),
    Goal("training step, middle layer f1+l1, its input kept / B", "suffix", "reft middle layer kept", "B", 0.37),
    Goal("training step, middle layer l1, target-only / B", "suffix", "reft middle layer l1 target-only", "B"),
    Goal("oneDNN products alone: B onednn / B", "onednn", "B onednn", "B"),
    Goal("peak memory of the step / B", "float32", OURS, "B", 0.85, memory=True),
    Goal("peak memory of the step / pyreft tied", "float32", OURS, "pyreft tied", 0.74, memory=True),
    Goal("peak memory of the step / LoRA r=32", "peers", OURS, "lora r32", 0.6, memory=True),
    Goal("peak memory, 48 target tokens / B", "float32", OURS, "B", workload=LONG, memory=True),
)  # fmt: skip
# products in oneDNN gain where B takes at most this part of its time; elsewhere their goal does not apply
ONEDNN_GAINS = 0.95


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


def measure(
    workload: str, group: str, variants: list[str], folder: str, args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Time the variants of a group on one workload; returns one record a variant."""
    pythons = {"pyreft": args.pyreft_python, "adapters": args.adapters_python}
    warmup = max(BATCHES, args.warmup) if group in KEEPING else args.warmup
    with tempfile.TemporaryDirectory() as work:
        batches = Path(work) / "batches.safetensors"
        save_file(make_batches(vocabulary_of(folder), *WORKLOADS[workload]), batches)
        launches = [
            interleaved(
                __file__,
                variants,
                {"folder": folder, "batch_file": str(batches)},
                rounds=args.rounds,
                warmup=warmup,
                threads=args.threads,
                pythons={v: pythons[VARIANTS[v].needs] for v in variants if VARIANTS[v].needs in pythons},
                name=f"{workload}, {group}, launch {number + 1}",
                first=number * args.rounds,  # of a launch's few timed rounds, no variant is always the first
            )
            for number in range(args.launches)
        ]
    for records in launches:
        check_losses(records)
    return {variant: together([records[variant] for records in launches]) for variant in variants}


def together(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the launches of a variant found: all their rounds, the median of their peak memory.

    The rounds of launches take turns, so that each fold of :func:`ratio` is of launches of its own (of a multiple of
    four): what slows a shared machine lasts for minutes, and rounds close together do not show it.
    """
    rounds = {
        clock: list(chain(*zip(*(r[clock] for r in records), strict=True))) for clock in ("wall", "cpu")
    }
    peaks = [record["peak_memory_bytes"] for record in records]
    return {**records[0], **rounds, "peak_memory_bytes": statistics.median(peaks), "peaks": peaks}


def check_losses(records: dict[str, dict[str, Any]]) -> None:
    """Logits at the targets alone must give the loss of all logits: both variants start from the same seed.

    Raises:
        RuntimeError: if the first losses differ by more than rounding.
    """
    for name, record in records.items():
        full = name.replace(" target-only", "")
        if full not in records:
            continue
        loss, expected = record["first"]["loss"], records[full]["first"]["loss"]
        if abs(loss - expected) > (1e-2 if "bf16" in name else 1e-3) * abs(expected):
            raise RuntimeError(f"{name!r} starts at loss {loss}, the same with all logits at {expected}")


def figures_of(found: dict[tuple[str, str], dict[str, dict[str, Any]]]) -> list[Figure]:
    """Return the figures of ``GOALS`` whose variants were both measured.

    Args:
        found: (workload, group) -> variant -> record.
    """
    figures = []
    for goal in GOALS:
        records = found.get((goal.workload, goal.group), {})
        if goal.above not in records or goal.below not in records:
            continue
        above, below = records[goal.above], records[goal.below]
        options = {"goal": goal.goal, "better": goal.better}
        if goal.above.endswith("onednn") and goal.goal is not None and "B onednn" in records:
            gain = ratio("", records["B onednn"]["wall"], records["B"]["wall"])["value"]
            if gain > ONEDNN_GAINS:
                options |= {"goal": None, "note": f"no goal: oneDNN gains nothing on this CPU, {gain:.2f}"}
        if goal.memory:
            figures.append(
                figure(goal.what, above["peak_memory_bytes"] / below["peak_memory_bytes"], **options)
            )
        else:
            figures.append(ratio(goal.what, above["wall"], below["wall"], **options))
    return figures


def left_out(args: argparse.Namespace) -> dict[str, str]:
    """Return why variants cannot run: package -> reason."""
    reasons = {}
    if importlib.util.find_spec("peft") is None:
        reasons["peft"] = "peft is not installed"
    if args.pyreft_python is None:
        reasons["pyreft"] = "no --pyreft-python"
    if args.adapters_python is None:
        reasons["adapters"] = "no --adapters-python"
    return reasons


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, HERE / "step", rounds=2, peers=("pyreft", "adapters"))
    parser.add_argument(
        "--launches", type=int, default=LAUNCHES, help=f"of each process, --rounds rounds each ({LAUNCHES})"
    )
    parser.add_argument("--groups", nargs="+", metavar="NAME", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--workloads", nargs="+", metavar="NAME", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument(
        "--variants", nargs="+", metavar="NAME", choices=VARIANTS, help=f"of {', '.join(VARIANTS)}; B always runs"
    )  # fmt: skip
    return parser.parse_args()


def main() -> None:
    """Measure every group on its workloads and write both files."""
    if is_worker():
        serve({name: functools.partial(load_step, name) for name in VARIANTS})
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = arguments()
    reasons = left_out(args)
    wanted = args.variants or list(VARIANTS)
    found, missing = {}, {}
    with model_folder(args) as folder:
        for group in args.groups:
            workloads, variants = GROUPS[group]
            asked = [name for name in variants if name == "B" or name in wanted]
            missing |= {n: reasons[VARIANTS[n].needs] for n in asked if VARIANTS[n].needs in reasons}
            variants = [name for name in asked if name not in missing]
            for workload in workloads:
                if workload in args.workloads and len(variants) > 1:
                    found[workload, group] = measure(workload, group, variants, folder, args)
    facts = header(
        "Training step time and memory, in ratios to B", args, torch=torch.__version__, left_out=missing
    )
    records = [
        {"workload": workload, "group": group, "variant": variant, **record}
        for (workload, group), variants in found.items()
        for variant, record in variants.items()
    ]
    tables = [f"## {key[0]}, {key[1]}\n\n{seconds_table(variants, 'B')}" for key, variants in found.items()]
    write(args.out, facts, records, figures_of(found), "\n\n".join(tables))
    log.info("wrote %s and %s", args.out.with_suffix(".json").name, args.out.with_suffix(".md").name)


if __name__ == "__main__":
    main()
