"""Time to attach, save and load 30 layers of LoReFT, and bytes on disk, next to pyreft.

    python experiments/speed/files.py --pyreft-python pyreft-venv/bin/python --out files

The base has SmolLM2-135M's blocks and a small vocabulary: none of the three touches the embeddings. Each round builds
a fresh base outside the clock, attaches to it, saves into a new folder, and loads into another fresh base.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from figures import Figure, add_arguments, fastest, figure, header, number, ratio, write
from models import SMOLLM2_135M
from processes import interleaved, is_worker, serve, stopwatch
from transformers import LlamaConfig, LlamaForCausalLM

log = logging.getLogger("speed")

HERE = Path(__file__).resolve().parent
PARTS = ("attach", "save", "load")
GOAL_MS = 10
GOAL_EXTRA_BYTES = 4096


def base(layers: int) -> torch.nn.Module:
    """Return a frozen base model."""
    shape = {**SMOLLM2_135M, "vocab_size": 64, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(**shape)).requires_grad_(False)


def timed_parts(
    layers: int,
    attach: Callable[[torch.nn.Module], Any],
    save: Callable[[Any, str], None],
    load: Callable[[torch.nn.Module, str], Any],
) -> Callable[[int], dict[str, Any]]:
    """Return a run that times the three parts, and counts the bytes of the folder."""

    def run(number: int) -> dict[str, Any]:
        first, second = base(layers), base(layers)
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "adapter"
            with stopwatch() as attaching:
                model = attach(first)
            with stopwatch() as saving:
                save(model, str(folder))
            with stopwatch() as loading:
                load(second, str(folder))
            sizes = {path.name: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        times = dict(zip(PARTS, (attaching, saving, loading), strict=True))
        return {
            "parts": {part: 1000 * found["wall"] for part, found in times.items()},
            "files": len(sizes),
            "bytes": sum(sizes.values()),
            "tensor_bytes": sizes.get("reft.safetensors"),
        }

    return run


def ours(layers: int):
    """This project."""
    import reft_lightning as rl

    def attach(model: torch.nn.Module) -> rl.ReftModel:
        return rl.attach(model, "loreft", rank=8, layers="all", positions="f7+l7", tied="all")

    run = timed_parts(
        layers, attach, lambda model, folder: model.save_pretrained(folder), rl.ReftModel.from_pretrained
    )
    run.report = {"parameters": attach(base(layers)).parameter_count().trainable}
    return run


def pyreft(layers: int):
    """The peer, through its own save and load."""
    import pyreft as peer
    from worker import pyreft_model

    return timed_parts(
        layers,
        lambda model: pyreft_model(model, tied=True)[0],
        lambda model, folder: model.save(folder),
        lambda model, folder: peer.ReftModel.load(folder, model),
    )


def figures_of(records: dict[str, dict[str, Any]], layers: int) -> list[Figure]:
    """Return milliseconds with their goals, size, and ratios to the peer."""
    own = records["ours"]
    figures = []
    for part in PARTS:
        times = [parts[part] for parts in own["parts"]]
        figures.append(fastest(f"{part} {layers} layers", times, goal=GOAL_MS, unit="ms"))
    extra = own["first"]["tensor_bytes"] - 4 * own["parameters"]
    figures.append(figure("file beyond parameters x 4 bytes", extra, goal=GOAL_EXTRA_BYTES, unit="bytes"))
    if "pyreft" in records:
        for part in PARTS:
            above, below = ([p[part] for p in records[name]["parts"]] for name in ("pyreft", "ours"))
            figures.append(ratio(f"{part}: pyreft / ours", above, below, better="higher"))
        sizes = [records[name]["first"]["bytes"] for name in ("pyreft", "ours")]
        figures.append(figure("bytes of the folder: pyreft / ours", sizes[0] / sizes[1], better="higher"))
    return figures


def table(records: dict[str, dict[str, Any]]) -> str:
    """Return fastest times and sizes as Markdown."""
    lines = ["| | attach ms | save ms | load ms | files | bytes |", "|---|---|---|---|---|---|"]
    for name, record in records.items():
        times = " | ".join(number(min(parts[part] for parts in record["parts"])) for part in PARTS)
        lines.append(f"| {name} | {times} | {record['first']['files']} | {record['first']['bytes']:,} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, HERE / "files", rounds=8, model=False, peers=("pyreft",))
    parser.add_argument("--layers", type=int, default=30)
    return parser.parse_args()


def main() -> None:
    """Measure and write both files."""
    if is_worker():
        serve({"ours": ours, "pyreft": pyreft})
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = arguments()
    with_peer = args.pyreft_python is not None
    records = interleaved(
        __file__,
        ["ours", "pyreft"] if with_peer else ["ours"],
        {"layers": args.layers},
        rounds=args.rounds,
        warmup=args.warmup,
        threads=args.threads,
        pythons={"pyreft": args.pyreft_python} if with_peer else {},
        name="files",
        clocks=("parts",),
    )
    missing = {} if with_peer else {"pyreft": "no --pyreft-python"}
    facts = header("Attach, save, load", args, layers=args.layers, torch=torch.__version__, left_out=missing)
    write(args.out, facts, records, figures_of(records, args.layers), table(records))
    log.info("wrote %s", args.out.with_suffix(".json").name)


if __name__ == "__main__":
    main()
