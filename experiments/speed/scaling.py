"""How a training step grows with tokens, layers, rank, positions and width, in ratios to B of the same size.

    python experiments/speed/scaling.py --out scaling

One size varies at a time around a small Llama (random weights, float32). At each point three steps take turns in one
process: B (the bare model with one trained vector at the embeddings, full logits), LoReFT with full logits, LoReFT
with logits of the targets only. What grows against B is what the interventions cost. Writes ``OUT.json``, ``OUT.md``,
``OUT.png`` and ``OUT.svg``; needs matplotlib.
"""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from figures import add_arguments, header, number, ratio, write
from processes import clocked
from step import make_batches
from transformers import LlamaConfig, LlamaForCausalLM
from worker import Step, Variant, bare, frozen, reft

log = logging.getLogger("speed")

HERE = Path(__file__).resolve().parent
ROWS, TARGET, VOCABULARY = 4, 6, 4096
BASE = {"tokens": 128, "layers": 8, "rank": 8, "positions": 14, "width": 256}
# what varies -> its values, its axis
SWEEPS: dict[str, tuple[tuple[int, ...], str]] = {
    "tokens": ((32, 64, 128, 256, 512), "tokens of a row"),
    "layers": ((2, 4, 8, 16, 32), "layers, an intervention each"),
    "rank": ((1, 4, 8, 32, 128), "rank r"),
    "positions": ((2, 6, 14, 30, 62), "edited positions of a row"),
    "width": ((64, 128, 256, 512, 1024), "width d"),
}
WAYS = ("B", "reft", "reft target-only")


def build(size: dict[str, int]) -> dict[str, Step]:
    """Return the three steps of one size."""
    width = size["width"]
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 8 * width // 3,
        "num_hidden_layers": size["layers"],
        "num_attention_heads": max(1, width // 64),
        "num_key_value_heads": max(1, width // 64),
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    }
    half = size["positions"] // 2
    method = partial(reft, positions=f"f{half}+l{half}", rank=size["rank"])
    attached = {"B": bare, "reft": partial(method, target_logits_only=False), "reft target-only": method}
    tensors = make_batches(VOCABULARY, ROWS, size["tokens"] - TARGET, TARGET)
    batch: dict[str, Any] = {k[2:]: tensor for k, tensor in tensors.items() if k.startswith("0.")}
    batch["boundary"] = int(batch["boundary"])
    steps = {}
    for way, attach in attached.items():
        torch.manual_seed(0)
        model = frozen(LlamaForCausalLM(LlamaConfig(**shape)))
        steps[way] = Step(Variant(attach), model, [batch])
    return steps


def measure(size: dict[str, int], rounds: int, warmup: int) -> dict[str, dict[str, list[float]]]:
    """Time the steps of one size in turns."""
    steps = build(size)
    times: dict[str, dict[str, list[float]]] = {way: {"wall": [], "cpu": []} for way in WAYS}
    for number_ in range(-warmup, rounds):
        turn = number_ % len(WAYS)
        for way in WAYS[turn:] + WAYS[:turn]:
            found = clocked(steps[way], number_)
            if number_ >= 0:
                for clock in ("wall", "cpu"):
                    times[way][clock].append(found[clock])
    return times


def table(points: list[dict[str, Any]]) -> str:
    """Return all points as Markdown."""
    lines = ["| what | value | B ms | LoReFT / B | target-only / B |", "|---|---|---|---|---|"]
    for point in points:
        base = min(point["times"]["B"]["wall"])
        found = [
            ratio("", point["times"][way]["wall"], point["times"]["B"]["wall"])["value"] for way in WAYS[1:]
        ]
        ratios = " | ".join(number(one) for one in found)
        lines.append(f"| {point['sweep']} | {point['value']} | {number(1000 * base)} | {ratios} |")
    return "\n".join(lines)


def plot(points: list[dict[str, Any]], out: Path) -> None:
    """Draw the ratios over each size; ``OUT.png`` and ``OUT.svg``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # blue and orange are told apart by all kinds of colour blindness; markers say the same in grey
    styles = {
        "reft": ("#0072B2", "o", "full logits"),
        "reft target-only": ("#D55E00", "s", "target-only logits"),
    }
    sweeps = list(dict.fromkeys(point["sweep"] for point in points))
    panels, axes = pyplot.subplots(
        1, len(sweeps), figsize=(3.2 * len(sweeps), 3.4), sharey=True, squeeze=False, constrained_layout=True
    )
    highest = 1.0
    for axis, sweep in zip(axes[0], sweeps, strict=True):
        chosen = [point for point in points if point["sweep"] == sweep]
        values = [point["value"] for point in chosen]
        for way, (colour, marker, label) in styles.items():
            found = [ratio("", point["times"][way]["wall"], point["times"]["B"]["wall"]) for point in chosen]
            heights = [one["value"] for one in found]
            axis.plot(values, heights, color=colour, marker=marker, label=label)
            axis.fill_between(
                values,
                [one["low"] for one in found],
                [one["high"] for one in found],
                color=colour,
                alpha=0.15,
            )
        axis.axhline(1, color="#555555", linewidth=1, linestyle=":")
        axis.set_xscale("log", base=2)
        axis.set_xticks(values, [str(value) for value in values])
        axis.set_xlabel(SWEEPS[sweep][1])
        highest = max([highest, *(max(line.get_ydata()) for line in axis.get_lines())])
    axes[0][0].set_ylim(0, 1.15 * highest)
    axes[0][0].set_ylabel("step time / step time of B")
    axes[0][0].legend(loc="lower left", frameon=False)
    for ending in ("png", "svg"):
        panels.savefig(
            out.with_suffix(f".{ending}"), dpi=150, metadata={"Date": None} if ending == "svg" else None
        )
    pyplot.close(panels)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, HERE / "scaling", rounds=8, warmup=2, model=False)
    parser.add_argument("--sweeps", nargs="+", metavar="NAME", choices=SWEEPS, default=list(SWEEPS),
                        help=f"of {', '.join(SWEEPS)}")  # fmt: skip
    parser.add_argument("--points", type=int, default=5, help="values of each, the smallest first")
    return parser.parse_args()


def main() -> None:
    """Measure every point, write the files and the plot."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = arguments()
    torch.set_num_threads(args.threads)
    points = []
    for sweep in args.sweeps:
        for value in SWEEPS[sweep][0][: args.points]:
            times = measure({**BASE, sweep: value}, args.rounds, args.warmup)
            points.append({"sweep": sweep, "value": value, "times": times})
            log.info("%s %d", sweep, value)
    figures = []
    for sweep in args.sweeps:
        last = [point for point in points if point["sweep"] == sweep][-1]
        what = f"step with full logits / B at {SWEEPS[sweep][1].partition(',')[0]} {last['value']}"
        figures.append(ratio(what, last["times"]["reft"]["wall"], last["times"]["B"]["wall"]))
    about = {"rows": ROWS, "target_tokens": TARGET, **BASE, "vocabulary": VOCABULARY}
    facts = header("How a training step grows", args, torch=torch.__version__, **about)
    write(args.out, facts, points, figures, table(points))
    plot(points, args.out)
    log.info("wrote %s, .md, .png and .svg", args.out.with_suffix(".json").name)


if __name__ == "__main__":
    main()
