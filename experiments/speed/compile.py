"""What torch.compile gains a training step: LoReFT and the bare frozen model, compiled and not.

    python experiments/speed/compile.py --random --out compile
    python experiments/speed/compile.py --model FOLDER --out compile

B is the bare frozen model with one trained vector at the embeddings, full logits. LoReFT: r = 8, f7+l7, all layers,
with full logits and with those of the targets alone, compiled by ``ReftModel.compile(fullgraph=True)``, so that a graph
break is an error. A compiled variant's first steps compile, for one length and then for any; they are the warm-up and
reported as seconds, fewer where torch has kept the kernels of an earlier run. Batches have four lengths. Needs a C++
compiler on a CPU. ``--layers`` makes the random model smaller.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import torch
from figures import add_arguments, figure, header, ratio, seconds_table, write
from models import SMOLLM2_135M, model_folder
from processes import interleaved, is_worker, serve

log = logging.getLogger("speed")

HERE = Path(__file__).resolve().parent
LENGTHS = (115, 111, 120, 108)  # of prompts; 6 target tokens follow
TARGET = 6
METHODS = ("B", "LoReFT", "LoReFT target-only")
GOAL = 0.78  # of the step with logits of the targets alone, against B


def batches(rows: int, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    """Draw a batch of each length; the time does not depend on the tokens."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for length in LENGTHS:
        ids = torch.randint(3, vocabulary, (rows, length + TARGET), generator=generator)
        target = (torch.arange(length + TARGET) >= length).expand_as(ids)
        drawn.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "labels": ids.masked_fill(~target, -100),
                "prompt_mask": ~target,
                "boundary": length,
            }
        )
    return drawn


def step(name: str, folder: str, rows: int):
    """Return a function of the round's number that trains one step of a variant."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).train()
    base.requires_grad_(False)
    base.config.use_cache = False
    drawn = batches(rows, base.config.vocab_size)
    if name.startswith("LoReFT"):
        import reft_lightning as rl
        from reft_lightning.base_models.output_head import join_columns
        from reft_lightning.data.encoding import target_only

        join_columns(base)
        model = rl.attach(base, "loreft", rank=8, positions="f7+l7").train()
        parameters = list(model.interventions.parameters())
        if "target-only" in name:
            drawn = [target_only(batch) for batch in drawn]
    else:
        model = base
        vector = torch.nn.Parameter(torch.zeros(base.config.hidden_size))
        base.get_input_embeddings().register_forward_hook(lambda module, args, out: out + vector)
        parameters = [vector]
        for batch in drawn:
            del batch["prompt_mask"]
    for batch in drawn:
        del batch["boundary"]
    if name.endswith("compiled"):
        model.compile(fullgraph=True)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)

    def run(number: int) -> dict[str, float]:
        started = time.perf_counter()
        batch = drawn[number % len(drawn)]
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number < len(drawn):
            run.report["compile_seconds"] += time.perf_counter() - started
        return {"loss": loss.item()}

    run.report = {"compile_seconds": 0.0}
    return run


VARIANTS = {
    name: lambda folder, rows, name=name: step(name, folder, rows)
    for method in METHODS
    for name in (method, f"{method} compiled")
}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, HERE / "compile", rounds=12, warmup=2 * len(LENGTHS))
    parser.add_argument("--rows", type=int, default=8, help="of a batch (8)")
    parser.add_argument("--layers", type=int, default=30, help="of the random model (30)")
    args = parser.parse_args()
    if args.warmup < len(LENGTHS):
        parser.error(f"--warmup must be at least {len(LENGTHS)}, one for each length; got {args.warmup}")
    return args


def main() -> None:
    """Measure and write both files."""
    if is_worker():
        serve(VARIANTS)
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = arguments()
    with model_folder(args, SMOLLM2_135M | {"num_hidden_layers": args.layers}) as folder:
        records = interleaved(
            __file__, list(VARIANTS), {"folder": folder, "rows": args.rows},
            rounds=args.rounds, warmup=args.warmup, threads=args.threads, name="compile",
        )  # fmt: skip
    for name in METHODS:
        first, compiled = (records[n]["first"]["loss"] for n in (name, f"{name} compiled"))
        if abs(first - compiled) > 1e-4 * abs(first):
            raise RuntimeError(f"the first loss of {name} is {first}, compiled {compiled}")
    wall = {name: record["wall"] for name, record in records.items()}
    figures = [
        ratio(f"training step, {args.rows} rows: {above} / {below}", wall[above], wall[below], goal=goal)
        for above, below, goal in (
            ("LoReFT compiled", "LoReFT", None), ("B compiled", "B", None), ("LoReFT compiled", "B compiled", None),
            ("LoReFT compiled", "B", None), ("LoReFT", "B", None), ("LoReFT target-only", "B", None),
            ("LoReFT target-only compiled", "LoReFT target-only", None), ("LoReFT target-only compiled", "B", GOAL),
        )
    ]  # fmt: skip
    seconds = records["LoReFT compiled"]["compile_seconds"]
    figures.append(figure("first step of each length, compilation included", seconds, unit="s"))
    facts = header("What torch.compile gains a training step", args, torch=torch.__version__, rows=args.rows)
    if args.random:
        facts["layers"] = args.layers
    write(args.out, facts, records, figures, seconds_table(records, "B"))
    log.info("wrote %s", args.out.with_suffix(".json").name)


if __name__ == "__main__":
    main()
