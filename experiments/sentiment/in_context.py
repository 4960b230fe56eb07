"""k demonstrations in the prompt against a rank-1 edit that was trained on the same k.

    python experiments/sentiment/in_context.py --data SST2_FOLDER

pyreft's example compares them on LLaMA-13B (examples/icl): rank-1 LoReFT at layer 15 and the last token, 200 steps of 8
rows, k of 4 to 50, seeds 42 to 44. Two scores, of the one pass that reads the question: whether the likelier of the two
labels is the right one, and whether the likeliest token of all is it. Writes `in_context.jsonl`, a line a cell.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import films
import torch

import reft_lightning as rl
from reft_lightning.base_models.loading import load_base_model
from reft_lightning.config.compose import compose
from reft_lightning.runs.arguments import model_source

HERE = Path(__file__).parent
LABELS = (" negative", " positive")
LAYER, STEPS, BATCH, RATE = 15, 100, 8, 1e-2


def asked(text: str) -> str:
    """Return a sentence as it is asked about."""
    return f"Review: {text}\nSentiment:"


def padded(tokenizer: Any, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, padded on the left."""
    batch = tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="left")
    return batch["input_ids"], batch["attention_mask"]


def scores(logits: torch.Tensor, rows: Sequence[films.Row], ids: Sequence[int]) -> list[tuple[bool, bool]]:
    """Return for each row whether the right label is the likelier one, and the likeliest token."""
    likelier = logits[:, list(ids)].argmax(-1).tolist()
    likeliest = logits.argmax(-1).tolist()
    return [(likelier[i] == label, likeliest[i] == ids[label]) for i, (_, label) in enumerate(rows)]


@torch.no_grad()
def score_of(
    model: Any, tokenizer: Any, rows: Sequence[films.Row], ids: Sequence[int], shown: str = ""
) -> list[Any]:
    """Score rows, after demonstrations that are read once."""
    found: list[Any] = []
    cache, first = None, tokenizer(shown, return_tensors="pt")["input_ids"] if shown else None
    if first is not None:
        cache = model(first, use_cache=True).past_key_values
    for start in range(0, len(rows), 40):
        part = rows[start : start + 40]
        tokens, mask = padded(tokenizer, [asked(text) for text, _ in part])
        more: dict[str, Any] = {}
        if cache is not None and first is not None:
            own = copy.deepcopy(cache)
            own.batch_repeat_interleave(len(part))
            before = torch.ones(len(part), first.shape[1], dtype=mask.dtype)
            mask = torch.cat([before, mask], 1)
            places = (mask.cumsum(-1) - 1)[:, first.shape[1] :].clamp(min=0)
            more = {"past_key_values": own, "position_ids": places}
        logits = model(tokens, attention_mask=mask, logits_to_keep=1, **more).logits[:, -1]
        found += scores(logits.float(), part, ids)
    return found


def train(reft: Any, tokenizer: Any, rows: Sequence[films.Row], ids: Sequence[int], seed: int) -> float:
    """Train on the demonstrations; return the mean loss of the last ten steps."""
    draw, losses = random.Random(seed), []
    optimizer = torch.optim.AdamW(
        [p for p in reft.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    order: list[films.Row] = []
    for _ in range(STEPS):
        while len(order) < min(BATCH, len(rows)):
            order += draw.sample(list(rows), len(rows))
        part, order = order[:BATCH], order[BATCH:]
        tokens, mask = padded(tokenizer, [asked(text) for text, _ in part])
        logits = reft(tokens, attention_mask=mask, logits_to_keep=1).logits[:, -1].float()
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([ids[label] for _, label in part]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


def main() -> None:
    """Measure every k with every seed, and add a line for each cell to the file."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--data", type=Path, required=True)
    arguments.add_argument("--shots", type=int, nargs="+", default=[4, 16, 32])
    arguments.add_argument("--seeds", type=int, nargs="+", default=[42, 43])
    arguments.add_argument("--test-rows", type=int, default=150)
    options = arguments.parse_args()
    model, tokenizer = load_base_model(**model_source(compose(films.MODEL)))
    ids = [tokenizer(label)["input_ids"] for label in LABELS]
    assert all(len(one) == 1 for one in ids), ids
    ids = [one[0] for one in ids]
    rows = random.Random(0).sample(films.read(options.data, "dev"), options.test_rows)
    known = films.read(options.data, "train")

    def note(**line: Any) -> None:
        right: list[Any] = line.pop("right")
        line |= {
            "rows": len(right),
            "likelier": sum(a for a, _ in right),
            "likeliest": sum(b for _, b in right),
        }
        with (HERE / "in_context.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)

    note(way="nothing shown", shots=0, seed=None, right=score_of(model, tokenizer, rows, ids))
    for seed in options.seeds:
        for shots in options.shots:
            half = [
                (text, label) for label in (0, 1) for text in films.sentences(known, label, shots // 2, seed)
            ]
            random.Random(seed).shuffle(half)
            start = time.perf_counter()
            shown = "".join(f"{asked(text)}{LABELS[label]}\n" for text, label in half)
            note(way="in context", shots=shots, seed=seed, right=score_of(model, tokenizer, rows, ids, shown),
                 seconds=time.perf_counter() - start)  # fmt: skip
            start = time.perf_counter()
            torch.manual_seed(seed)
            reft = rl.attach(model, "loreft", rank=1, layers=[LAYER], positions="l1").train()
            loss = train(reft, tokenizer, half, ids, seed)
            note(way="edit", shots=shots, seed=seed, loss=loss, right=score_of(reft.eval(), tokenizer, rows, ids),
                 seconds=time.perf_counter() - start)  # fmt: skip
            reft.detach()


if __name__ == "__main__":
    main()
