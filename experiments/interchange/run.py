"""Does distributed alignment search find a causal variable that is known to be there, and only there?

    python experiments/interchange/run.py --out RUNS        # a few minutes; writes results.jsonl here

Trains a small Llama from nothing on a switch ("KEY X Y ?": X where the key is of the one kind, else Y), writes rows of
two prompts whose counterfactual label takes the kind of key from the second, and searches for that variable.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from reft_lightning.config import compose
from reft_lightning.runs import experiment

HERE = Path(__file__).parent
KEYS, SYMBOLS = [f"k{i}" for i in range(16)], [f"s{i}" for i in range(8)]
LAYERS = 4
COMMON = [
    "model=local", "data=custom", "data.prompt=base", "data.source_prompt=source", "data.target=label",
    "data.batch_size=64", "data.template=plain", "objective=interchange", "intervention.rank=1", "optimizer.lr=2e-2",
    "trainer=cpu", "trainer.max_epochs=1", "trainer.enable_progress_bar=false", "decoding.max_new_tokens=2",
    "logger=csv", "evaluate_base=true", "seed=42",
]  # fmt: skip


def draw(rng: random.Random, kind: int) -> list[str]:
    """Return a question whose key is of a kind."""
    return [rng.choice(KEYS[kind::2]), rng.choice(SYMBOLS), rng.choice(SYMBOLS), "?"]


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a word."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "?", *KEYS, *SYMBOLS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def pretrain(folder: Path, steps: int) -> float:
    """Train the base model, or with no steps leave it random; return its accuracy."""
    torch.manual_seed(0)
    words, rng = tokenizer(), random.Random(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
    }
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 32}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes, **special))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)

    def questions(count: int) -> torch.Tensor:
        kinds = [rng.randrange(2) for _ in range(count)]
        texts = [draw(rng, kind) for kind in kinds]
        whole = [[*text, text[1 + kind], "</s>"] for text, kind in zip(texts, kinds, strict=True)]
        return torch.tensor(words([" ".join(text) for text in whole])["input_ids"])

    for _ in range(steps):
        ids = questions(128)
        loss = model(ids, labels=ids.masked_fill(torch.arange(ids.shape[1]) < 5, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        ids = questions(1024)
        right = model.eval()(ids).logits[:, 4].argmax(-1) == ids[:, 5]
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return right.float().mean().item()


def write_pairs(folder: Path) -> None:
    """Write pairs for both objectives: the counterfactual label, and for CDAS the source's own answer."""
    folder.mkdir(exist_ok=True)
    for split, count, seed in (("train", 6400, 1), ("validation", 256, 2), ("test", 512, 3)):
        rng = random.Random(seed)
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["base", "source", "label", "theirs"])
            for i in range(count):
                base, source = draw(rng, i % 2), draw(rng, i // 2 % 2)
                place = 1 + i // 2 % 2  # of the kind of the source's key
                writer.writerow([" ".join(base), " ".join(source), base[place], source[place]])


def das(layer: int, positions: str, *more: str) -> list[str]:
    """Return the overrides of a search at a site."""
    return [
        "intervention=das",
        f"intervention.layers=[{layer}]",
        f"intervention.positions={positions}",
        *more,
    ]


INPUT = "intervention.component=block_input"
BOUNDLESS = (
    "intervention=boundless_das", "intervention.rank=null", "intervention.options.sparsity=0.3",
    "intervention.options.start=4", "optimizer.lr=2e-3", "trainer.max_epochs=2",
)  # fmt: skip
RUNS = {
    # name: (base model, overrides)
    "into block 0, the key": ("trained", das(0, "f2", INPUT)),
    **{f"after block {layer}, the key": ("trained", das(layer, "f2")) for layer in range(LAYERS)},
    **{f"after block {layer}, what follows it": ("trained", das(layer, "l3")) for layer in range(LAYERS)},
    "random model, into block 0, the key": ("random", das(0, "f2", INPUT)),
    "random model, after block 0, what follows it": ("random", das(0, "l3")),
    "boundless, after block 0, what follows it": ("trained", das(0, "l3", *BOUNDLESS)),
    "boundless, after block 1, what follows it": ("trained", das(1, "l3", *BOUNDLESS)),
    "concept DAS, after block 3, to the source's answer": ("trained", [
        "intervention=cdas", "intervention.layers=[3]", "intervention.rank=8", "objective=cdas", "data.target=theirs",
    ]),
}  # fmt: skip


def share_of(path: Path) -> float | None:
    """Return the boundary that boundless DAS learned, of 1."""
    found = [tensor for name, tensor in load_file(path).items() if name.endswith("boundary")]
    return round(10 * found[0].item(), 4) if found else None


def main() -> None:
    """Make models and rows, run what has not run yet, and collect."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--out", type=Path, required=True)
    out = arguments.parse_args().out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    accuracies = out / "accuracies.json"
    if not accuracies.exists():
        found = {name: pretrain(out / name, steps) for name, steps in (("trained", 200), ("random", 0))}
        accuracies.write_text(json.dumps(found))
    write_pairs(out / "pairs")
    found = json.loads(accuracies.read_text())
    lines = [{"base model": name, "accuracy": round(right, 4)} for name, right in found.items()]
    for number, (name, (base, own)) in enumerate(RUNS.items()):
        folder = out / f"run{number}"
        command = [*COMMON, *own]
        places = [f"model.path={out / base}", f"data.path={out / 'pairs'}"]
        if not (folder / "results.json").exists():
            torch.manual_seed(42)
            experiment.run(compose.compose([*command, *places]), folder)
        results = json.loads((folder / "results.json").read_text())
        names = ("test/custom/accuracy", "base/test/custom/accuracy")
        measures = {measure: results["metrics"][measure] for measure in names}
        lines.append({
            "run": name, "base model": base, "command": " ".join(command), **measures,
            "trainable_parameters": results["trainable_parameters"], "steps": results["steps"],
            "share of directions": share_of(folder / "adapter" / "reft.safetensors"),
            "train_metrics": results.get("train_metrics"), "git_commit": results["git_commit"],
        })  # fmt: skip
        print(name, measures, flush=True)
    text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)
    (HERE / "results.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
