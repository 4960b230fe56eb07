"""Time of greedy decoding with the gold target as a draft, in ratios to plain greedy decoding of the same rows.

    python experiments/speed/verified_decoding.py --model FOLDER --adapter FOLDER --rows boolq/test.json.gz

``--rows`` is a file of commonsense rows as LLM-Adapters has them (``instruction``, ``output``), ``--adapter`` what a
run saved: with random weights no draft would be right. Two models: the adapter, which knows the answers' format and
agrees with most of each draft, and the frozen base, which agrees with nothing: there a draft only costs. In each round
every batch is decoded plainly and with the draft, and its prompts are read once without any decoding, which nothing
that reads the prompts can beat: one right after the other, in an order that changes by the round. Writes ``OUT.json``
(every measurement) and ``OUT.md`` (tables).
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from figures import Figure, add_arguments, header, ratio, write

import reft_lightning as rl
from reft_lightning.base_models.loading import load_base_model
from reft_lightning.data.encoding import Collator, encode
from reft_lightning.data.example import Example
from reft_lightning.evaluation import ColumnReader
from reft_lightning.evaluation.decoding import Decoding, generate_ids

log = logging.getLogger("speed")

HERE = Path(__file__).resolve().parent
MODELS = ("adapter", "frozen base")
WAYS = ("plain", "verified", "prompts alone")
GOAL = 3.0  # plain / verified, for an adapter that knows the format


def load_batches(path: Path, tokenizer: Any, limit: int, size: int, device: str) -> list[dict[str, Any]]:
    """Return batches of prompt | target, rows of like length together as in an evaluation."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = json.loads(text)[:limit]
    examples = [Example("speed", row["instruction"] + "\n", row["output"], row["output"]) for row in rows]
    encoded = sorted((encode(tokenizer, example, 512) for example in examples), key=len)
    collate = Collator(tokenizer.pad_token_id)
    batches = [collate(encoded[i : i + size]) for i in range(0, len(encoded), size)]
    return [{k: v if k == "boundary" else v.to(device) for k, v in batch.items()} for batch in batches]


def read_prompts(model: rl.ReftModel, batch: dict[str, Any]) -> None:
    """Read the prompts with the logits after them, as every way to a first token must."""
    boundary = batch["boundary"]
    prompts = {name: batch[name][:, :boundary] for name in ("input_ids", "attention_mask", "prompt_mask")}
    ColumnReader(model).logits({**prompts, "boundary": boundary})


def timed(model: rl.ReftModel, work: Callable[[], Any]) -> dict[str, Any]:
    """Do something with one batch: seconds on the clock and of the processor, and what comes of it."""
    cuda = model.base_model.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    ids = work()
    if cuda:
        torch.cuda.synchronize()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "ids": ids}


def measure(
    model: rl.ReftModel, name: str, batches: list, tokenizer: Any, args: argparse.Namespace
) -> dict[str, Any]:
    """Take all batches in each way, ``args.rounds`` times."""
    decodings = {
        "plain": Decoding(args.max_new_tokens, verify=False),
        "verified": Decoding(args.max_new_tokens),
    }
    times: dict[str, dict[str, list[float]]] = {way: {"wall": [], "cpu": []} for way in WAYS}
    counts = {"rows": 0, "accepted_whole": 0, "rows_that_differ": 0}
    with model.disabled() if name == "frozen base" else nullcontext():
        for number in range(-args.warmup, args.rounds):
            turn = number % len(WAYS)
            sums = {way: {"wall": 0.0, "cpu": 0.0} for way in WAYS}
            for batch in batches:
                work = {
                    way: partial(generate_ids, model, batch, tokenizer, decoding)
                    for way, decoding in decodings.items()
                }
                work["prompts alone"] = partial(read_prompts, model, batch)
                found = {way: timed(model, work[way]) for way in WAYS[turn:] + WAYS[:turn]}
                for way, result in found.items():
                    for clock in ("wall", "cpu"):
                        sums[way][clock] += result[clock]
                if number == 0:
                    count(counts, batch, found["plain"]["ids"], found["verified"]["ids"])
            if number >= 0:
                for way in WAYS:
                    for clock in ("wall", "cpu"):
                        times[way][clock].append(sums[way][clock])
            log.info("%s: round %d of %d", name, number + 1, args.rounds)
    ratios = {
        f"ratio_{kind}": pick(times["verified"][clock]) / pick(times["plain"][clock])
        for kind, clock, pick in (
            ("best", "wall", min),
            ("median", "wall", statistics.median),
            ("cpu", "cpu", min),
        )
    }
    return {"model": name, **counts, **ratios, **times}


def count(counts: dict[str, int], batch: dict[str, Any], plain: torch.Tensor, verified: torch.Tensor) -> None:
    """Add the rows of a batch: all, those whose whole target was right, those that came out otherwise."""
    target = batch["labels"][:, batch["boundary"] :][:, : verified.shape[1]]
    right = (verified[:, : target.shape[1]] == target) | (target == -100)
    counts["rows"] += len(verified)
    counts["accepted_whole"] += int(right.all(-1).sum())
    counts["rows_that_differ"] += int((plain != verified).any(-1).sum())


def figures_of(records: list[dict[str, Any]], size: int) -> list[Figure]:
    """Return how much faster checking a draft is, and how much faster anything could be."""
    found = []
    for r in records:
        times = {way: r[way]["wall"] for way in WAYS}
        what = f"decoding {r['model']}, batch {size}"
        goal = GOAL if r["model"] == "adapter" else None
        right = f"target right in {r['accepted_whole']} of {r['rows']} rows"
        found += [
            ratio(
                f"{what}, plain / verified",
                times["plain"],
                times["verified"],
                goal=goal,
                better="higher",
                note=right,
            ),
            ratio(
                f"{what}, plain / prompts alone",
                times["plain"],
                times["prompts alone"],
                better="higher",
                note="what no way that reads the prompts can beat",
            ),
        ]
    return found


def table(records: list[dict[str, Any]]) -> str:
    """Return a Markdown table."""
    lines = [
        "| model | verified / plain, best | median | cpu | plain, best s | verified, best s | prompts alone, best s "
        "| rows | target right | ids differ |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in records:
        ratios = " | ".join(f"{r[key]:.2f}" for key in ("ratio_best", "ratio_median", "ratio_cpu"))
        seconds = " | ".join(f"{min(r[way]['wall']):.2f}" for way in WAYS)
        rows = f"{r['rows']} | {r['accepted_whole']} | {r['rows_that_differ']}"
        lines.append(f"| {r['model']} | {ratios} | {seconds} | {rows} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a Hugging Face causal model")
    parser.add_argument("--adapter", type=Path, required=True, help="folder of an adapter trained on it")
    parser.add_argument(
        "--rows", type=Path, required=True, help="JSON file of commonsense rows, may end in .gz"
    )
    parser.add_argument("--limit", type=int, default=64, help="rows")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base model"
    )
    parser.add_argument("--device", default="cpu")
    add_arguments(parser, HERE / "verified_decoding", rounds=8, model=False)
    return parser.parse_args()


def main() -> None:
    """Measure both models and write both files."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = arguments()
    torch.set_num_threads(args.threads)
    base, tokenizer = load_base_model(
        source="local", path=str(args.model), dtype=args.dtype, float32_logits=True
    )
    model = rl.ReftModel.from_pretrained(base, args.adapter).eval().to(args.device)
    batches = load_batches(args.rows, tokenizer, args.limit, args.batch_size, args.device)
    records = [measure(model, name, batches, tokenizer, args) for name in MODELS]
    facts = header(
        "Greedy decoding with the gold target as a draft, next to plain greedy decoding",
        args,
        model=args.model.resolve().name,
        rows=f"{args.rows.parent.name}/{args.rows.name}",
        prompt_columns=[batch["boundary"] for batch in batches],
        target_columns=[batch["input_ids"].shape[1] - batch["boundary"] for batch in batches],
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        dtype=args.dtype,
        device=torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device,
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
    )
    write(args.out, facts, records, figures_of(records, args.batch_size), table(records))
    log.info("wrote %s and %s", args.out.with_suffix(".json").name, args.out.with_suffix(".md").name)


if __name__ == "__main__":
    main()
