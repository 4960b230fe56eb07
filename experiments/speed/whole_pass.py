"""Examples a second over a pass of a commonsense mixture: ``reft-train`` next to pyreft's own trainer.

    python experiments/speed/whole_pass.py --random --pyreft-python pyreft-venv/bin/python --out whole_pass
    python experiments/speed/whole_pass.py --model FOLDER --mixture commonsense_170k.json --pyreft-python ...

Ours is a whole run with the configuration's defaults; its clock is the run's own
``train_seconds``: batches by length, target-only logits, Lightning, checkpoints. pyreft's is ``ReftTrainerForCausalLM``
with its own collator and loader, as its commonsense script calls it: a token in front, rows padded on the right, random
batches, all logits; its clock is ``train_runtime``. Reading and tokenising stand outside both clocks. The same rows in
tokens, the same float32 base, 16 rows a step unless ``--batch-size`` says otherwise, LoReFT r = 8 f7+l7 tied. A round
is a pass of each. Without ``--mixture``, rows are invented with the lengths of a real mixture.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from figures import add_arguments, figure, header, ratio, seconds_table, write
from models import model_folder
from processes import interleaved, is_worker, serve
from runs import invented_lengths, invented_rows, overrides, sampled_rows, tokenizer_of
from torch import Tensor
from worker import PREFIX, SUFFIX, pyreft_model

log = logging.getLogger("speed")

HERE = Path(__file__).resolve().parent
GOAL = 3.0


def ours(folder: str, mixture: str, tokenizer: str | None, batch_size: int, extra: list[str], **_: Any):
    """A run of this project a round."""
    from reft_lightning.config.compose import compose
    from reft_lightning.runs.experiment import run as run_experiment

    config_of = [*overrides(folder, Path(mixture), tokenizer, batch_size=batch_size), *extra]

    def run(number: int) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as work:
            results = run_experiment(compose(config_of), Path(work) / "run")
        return {"wall": results["train_seconds"], "steps": results["steps"], "tokens": results["tokens"]}

    return run


def pyreft(folder: str, rows: str, pad: int, batch_size: int, **_: Any):
    """A pass of pyreft's trainer a round."""
    import pyreft as peer
    from transformers import AutoModelForCausalLM, TrainingArguments

    class Trainer(peer.ReftTrainerForCausalLM):
        # transformers passes num_items_in_batch since 4.46, which pyreft 0.1.0 does not take
        def compute_loss(self, intervenable, inputs, return_outputs=False, **_: Any):
            return super().compute_loss(intervenable, inputs, return_outputs)

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    base.requires_grad_(False)
    base.config.use_cache = False
    model, representations = pyreft_model(base, tied=True)
    data = [peer_row(row, pad, len(representations)) for row in json.loads(Path(rows).read_text())]
    collate = peer.ReftDataCollator(data_collator=PadRight(pad))

    def run(number: int) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as work:
            settings = TrainingArguments(
                output_dir=work, num_train_epochs=1, per_device_train_batch_size=batch_size, learning_rate=9e-4,
                lr_scheduler_type="linear", logging_steps=10, save_strategy="no", report_to=[],
                use_cpu=True, remove_unused_columns=False, disable_tqdm=True, seed=number,
            )  # fmt: skip
            done = Trainer(model=model, args=settings, train_dataset=data, data_collator=collate).train()
        return {"wall": done.metrics["train_runtime"], "steps": done.global_step}

    return run


def peer_row(row: dict[str, list[int]], pad: int, interventions: int) -> dict[str, Any]:
    """Return a row as pyreft's data sets prepare it: a token in front, for unused slots, all moved by one."""
    import pyreft as peer

    locations = peer.get_intervention_locations(
        last_position=len(row["prompt"]),
        positions=f"f{PREFIX}+l{SUFFIX}",
        num_interventions=interventions,
        share_weights=True,
    )
    return {
        "input_ids": [pad, *row["prompt"], *row["target"]],
        "attention_mask": [0] + [1] * (len(row["prompt"]) + len(row["target"])),
        "labels": [-100] * (1 + len(row["prompt"])) + row["target"],
        "intervention_locations": [[slot + 1 for slot in slots] for slots in locations],
    }


class PadRight:
    """Pad on the right to the longest row, as transformers' DataCollatorForSeq2Seq does, which needs a tokenizer."""

    def __init__(self, pad: int) -> None:
        self.fill = {"input_ids": pad, "attention_mask": 0, "labels": -100}

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the tensors of a batch."""
        width = max(len(row["input_ids"]) for row in rows)
        batch = {
            name: torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in rows])
            for name, fill in self.fill.items()
        }
        return {
            **batch,
            "intervention_locations": torch.tensor([row["intervention_locations"] for row in rows]),
        }


def tokens_of(
    folder: str, mixture: Path, tokenizer_name: str | None, args: argparse.Namespace
) -> tuple[list[dict[str, list[int]]], int]:
    """Return prompt and target tokens of every row as this project encodes them, and the pad token."""
    from reft_lightning.base_models.loading import load_tokenizer
    from reft_lightning.config.compose import compose
    from reft_lightning.runs.build import data_module, family_of

    config = compose(overrides(folder, mixture, tokenizer_name, batch_size=args.batch_size))
    tokenizer = load_tokenizer(source="local", path=folder, tokenizer=tokenizer_name)
    data = data_module(config, family_of(config), tokenizer)
    rows = [data.train_rows[i] for i in range(len(data.train_rows))]
    return [{"prompt": row.prompt_ids, "target": row.target_ids} for row in rows], tokenizer.pad_token_id


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, HERE / "whole_pass", rounds=1, warmup=0, peers=("pyreft",))
    parser.add_argument(
        "--mixture", type=Path, help="JSON file of commonsense rows, may end in .gz; else invented rows"
    )
    parser.add_argument("--limit", type=int, default=640, help="rows")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="of our configuration"
    )
    return parser.parse_args()


def main() -> None:
    """Measure and write both files."""
    if is_worker():
        serve({"ours": ours, "pyreft": pyreft})
        return
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    args = arguments()
    with_peer = args.pyreft_python is not None
    with model_folder(args) as folder, tempfile.TemporaryDirectory() as work:
        invented = args.mixture is None
        rows = (
            invented_rows(invented_lengths(args.limit))
            if invented
            else sampled_rows(args.mixture, args.limit)
        )
        mixture, tokens = Path(work) / "mixture.json", Path(work) / "tokens.json"
        mixture.write_text(json.dumps(rows), encoding="utf-8")
        tokenizer = tokenizer_of(folder, invented)
        encoded, pad = tokens_of(folder, mixture, tokenizer, args)
        tokens.write_text(json.dumps(encoded))
        records = interleaved(
            __file__,
            ["ours", "pyreft"] if with_peer else ["ours"],
            {
                "folder": folder, "mixture": str(mixture), "tokenizer": tokenizer, "rows": str(tokens), "pad": pad,
                "batch_size": args.batch_size, "extra": args.overrides,
            },
            rounds=args.rounds,
            warmup=args.warmup,
            threads=args.threads,
            pythons={"pyreft": args.pyreft_python} if with_peer else {},
            name="whole pass",
        )  # fmt: skip
    lengths = [len(row["prompt"]) + len(row["target"]) for row in encoded]
    figures = []
    if with_peer:
        what = f"examples/s over a pass of the commonsense mixture, batch {args.batch_size}: ours / pyreft's trainer"
        figures.append(
            ratio(what, records["pyreft"]["wall"], records["ours"]["wall"], goal=GOAL, better="higher")
        )
    best = min(records["ours"]["wall"])
    figures.append(figure("examples a second of this run", args.limit / best, better="higher", unit="1/s"))
    facts = header(
        "A pass of the commonsense mixture", args, torch=torch.__version__, batch_size=args.batch_size,
        rows=args.limit, tokens=sum(lengths), real_rows=not invented, overrides=args.overrides,
        left_out={} if with_peer else {"pyreft": "no --pyreft-python"},
    )  # fmt: skip
    write(args.out, facts, records, figures, seconds_table(records, "ours"))
    log.info("wrote %s", args.out.with_suffix(".json").name)


if __name__ == "__main__":
    main()
