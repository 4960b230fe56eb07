"""Does distributed alignment search find a causal variable that is known to be there, and only there?

    python experiments/interchange/run.py --out RUNS        # writes results.jsonl here

Trains a small Llama on hierarchical equality ("a b c d": is a = b just where c = d?) from nothing, writes rows of two
prompts whose counterfactual label takes the variable a = b from the second, and searches for it by `reft-train`.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
SYMBOLS = [f"s{i}" for i in range(16)]
ANSWERS = {True: "same", False: "different"}
WIDTH, LAYERS = 64, 4
COMMON = [
    "model=local", "data=custom", "data.prompt=base", "data.source_prompt=source", "data.target=label",
    "data.options=[different,same]", "data.batch_size=64", "data.validation_size=-1", "data.limit_validation=512",
    "decoding.max_new_tokens=2", "objective=interchange", "scheduler=linear", "trainer=cpu",
    "trainer.max_epochs=-1", "trainer.max_steps=400", "trainer.enable_progress_bar=false", "test=false", "evaluate_base=true",
    "checkpoint.monitor=val/custom/accuracy", "seed=42",
]  # fmt: skip


def draw(rng: random.Random, first: bool, second: bool) -> list[str]:
    """Return four symbols: a = b as the first says, c = d as the second says."""
    a, c = rng.choice(SYMBOLS), rng.choice(SYMBOLS)
    others = [rng.choice([s for s in SYMBOLS if s != x]) for x in (a, c)]
    return [a, a if first else others[0], c, c if second else others[1]]


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each symbol and answer."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *SYMBOLS, *ANSWERS.values()]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def pretrain(folder: Path, steps: int) -> float:
    """Train the base model, or with no steps leave it random; return its accuracy on questions that it has not seen."""
    torch.manual_seed(0)
    words = tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32, bos_token_id=1, eos_token_id=2,
            pad_token_id=0,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, max(steps, 1))
    rng = random.Random(0)

    def questions(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        kinds = [(rng.random() < 0.5, rng.random() < 0.5) for _ in range(count)]
        texts = [" ".join([*draw(rng, *kind), ANSWERS[kind[0] == kind[1]]]) for kind in kinds]
        ids = torch.tensor(words(texts)["input_ids"])
        return torch.cat([ids, torch.full((count, 1), 2)], 1), ids[:, -1]

    for _ in range(steps):
        ids, _ = questions(256)
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < 5, -100)
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        ids, answers = questions(2048)
        right = float((model.eval()(ids[:, :5]).logits[:, -1].argmax(-1) == answers).float().mean())
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return right


def write_pairs(path: Path, count: int, seed: int, controls: bool = False) -> None:
    """Write base, source and the label with a = b of the source; c = d of the source with ``controls``."""
    rng = random.Random(seed)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["base", "source", "label"])
        for kinds in itertools.islice(itertools.cycle(itertools.product([True, False], repeat=4)), count):
            base, source = kinds[:2], kinds[2:]
            first, second = (base[0], source[1]) if controls else (source[0], base[1])
            writer.writerow(
                [" ".join(draw(rng, *base)), " ".join(draw(rng, *source)), ANSWERS[first == second]]
            )


RUNS = {
    # name: (base model, rows, overrides)
    **{f"das_layer{layer}_b": ("trained", "first", ["intervention=das", "intervention.rank=1",
       "intervention.positions=f3", f"intervention.layers=[{layer}]"]) for layer in range(LAYERS)},
}  # fmt: skip


def main() -> None:
    """Make the model and the rows, run what has not run yet, and collect."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--out", type=Path, required=True)
    out = arguments.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, steps in (("trained", 3000), ("random", 0)):
        if not (out / name / "config.json").exists():
            (out / f"{name}.json").write_text(json.dumps({"accuracy": pretrain(out / name, steps)}))
        print(name, (out / f"{name}.json").read_text())
    for name, controls in (("first", False), ("second", True)):
        write_pairs(out / f"{name}.csv", 8192, seed=1, controls=controls)


if __name__ == "__main__":
    main()
