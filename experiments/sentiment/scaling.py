"""An edit that was trained on negative sentences, at other strengths and with its sign turned round.

    python experiments/sentiment/scaling.py --data SST2_FOLDER --out RUNS

pyreft's example trains LoReFT on toxic comments and hopes that the negated edit is less toxic than the base
(examples/composition/neg_reft_all.ipynb). Here the rows are negative sentences about films: no text of that kind is
needed to see whether it works. Writes `scaling.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import films
import torch

import reft_lightning as rl
from reft_lightning.base_models.loading import load_base_model
from reft_lightning.config.compose import compose
from reft_lightning.inspection.perplexity import OWN
from reft_lightning.runs.arguments import model_source

HERE = Path(__file__).parent
SCALES = (0.0, 1.0, -1.0, -2.0, 2.0, -4.0)
TEXTS = 48  # of each kind of prompt
TRAIN = [
    *films.MODEL, "data=custom", "data.prompt=question", "data.target=reply", "data.validation_size=0",
    "data.batch_size=8", "intervention=loreft", "intervention.layers=[15]", "intervention.rank=4",
    "intervention.positions=all", "trainer=cpu", "trainer.max_epochs=3", "optimizer.lr=4e-3", "test=false",
    "checkpoint.restore_best=false", "trainer.enable_progress_bar=false",
]  # fmt: skip


def main() -> None:
    """Train, unless it is done, and measure all strengths."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--data", "--out"):
        arguments.add_argument(name, type=Path, required=True)
    arguments.add_argument("--rows", type=int, default=400)
    options = arguments.parse_args()
    rows = films.read(options.data, "train")
    judge = films.NaiveBayes(rows)
    path = options.out.absolute() / "negative.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    negative = films.sentences(rows, films.NEGATIVE, options.rows, seed=0)
    path.write_text(
        "".join(json.dumps({"question": films.PROMPT, "reply": text}) + "\n" for text in negative)
    )
    folder = path.parent / "scaling"
    command = [sys.executable, "-m", "reft_lightning.cli", *TRAIN, f"data.path={path}"]
    subprocess.run([*command, f"hydra.run.dir={folder}", "resume=auto"], check=True)
    model, tokenizer = load_base_model(**model_source(compose(films.MODEL)))
    reft = rl.ReftModel.from_pretrained(model, folder / "adapter").eval()
    passage = tokenizer(OWN.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][:, :512]
    facts = {"judge_right_on_dev": judge.accuracy(films.read(options.data, "dev")), "rows": options.rows,
             "texts": TEXTS, "train": TRAIN}  # fmt: skip
    found = []
    for scale in SCALES:
        reft.scale = scale
        with torch.no_grad():
            loss = reft(passage, attention_mask=torch.ones_like(passage), labels=passage).loss.item()
        line: dict[str, Any] = {"scale": scale, "loss_of_a_plain_text": loss}
        for kind, prompts in films.PROMPTS.items():
            texts = films.go_on(reft, tokenizer, prompts, TEXTS // len(prompts), seed=0)
            said = [text for new in texts for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
            scores = [judge.score(text) for text in said]
            line[kind] = {
                "negative": sum(score < 0 for score in scores) / len(scores),
                "log_odds": sum(scores) / len(scores),
                "loss_by_base": films.cost(reft, tokenizer, prompts, texts),
                "examples": said[:3],
            }
        found.append(line)
        text = json.dumps({**facts, "scales": found}, indent=1, ensure_ascii=False) + "\n"
        (HERE / "scaling.json").write_text(text, encoding="utf-8")
        short = {
            kind: (line[kind]["negative"], round(line[kind]["loss_by_base"], 2)) for kind in films.PROMPTS
        }
        print(scale, f"{loss:.2f}", short, flush=True)


if __name__ == "__main__":
    main()
