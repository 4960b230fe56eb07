"""Strength against fluency: four ways to find a direction for negative sentiment, and a random one.

    python experiments/sentiment/steering.py --data SST2_FOLDER --out RUNS
    python experiments/sentiment/steering.py --plot

Each way is trained by reft-train on the same pairs of sentences about films, the negative one chosen, at layer 15 and
all tokens. A strength is the median length of the edits over that of their hidden states, so that the ways can be
compared: `scale` is set to reach it. Texts are sampled after the prompt of training and after others. Concept: the
share of texts that naive Bayes takes for negative. Fluency: the frozen base's loss of the text. Writes
`steering.jsonl`, a line a point, and `steering.png`.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import films
import torch

import reft_lightning as rl
from reft_lightning.adapters.reft.measuring import Seen, watching
from reft_lightning.base_models.loading import load_base_model
from reft_lightning.config.compose import compose
from reft_lightning.runs.arguments import model_source

HERE = Path(__file__).parent
RESULTS = HERE / "steering.jsonl"
LAYER = 15
STRENGTHS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)
TEXTS = 64  # of each kind of prompt
BOUND = 0.7  # nats a token by which a fluent text may cost more than the base's; set before the first run
COMMON = [
    *films.MODEL, "data=custom", "data.prompt=question", "data.target=chosen", "data.options=[chosen,rejected]",
    "data.validation_size=0", "data.batch_size=8", "trainer=cpu", "trainer.max_steps=60", "trainer.max_epochs=-1",
    "test=false", "checkpoint.restore_best=false", "trainer.enable_progress_bar=false",
    "trainer.log_every_n_steps=1",
]  # fmt: skip
AT = [f"intervention.layers=[{LAYER}]", "intervention.positions=all"]
CLOSED = ["objective=difference_in_means", "trainer.max_steps=-1", "trainer.max_epochs=1", "optimizer=closed_form",
          "trainer.accumulate_grad_batches=100000", "trainer.gradient_clip_val=null", "scheduler=constant"]  # fmt: skip
WAYS = {
    "difference in means": ["intervention=difference_in_means", *AT, *CLOSED],
    "ReFT-r1": ["intervention=reft_r1", *AT, "callbacks=penalty_linear", "optimizer.lr=1e-2"],
    "RePS": ["intervention=bias", *AT, "objective=reps", "optimizer.lr=5e-3"],
    "LoReFT": ["intervention=loreft", *AT, "intervention.rank=4", "optimizer.lr=4e-3"],
}
RANDOM = "a random vector"


def train(way: str, seed: int, out: Path, path: Path) -> Path:
    """Run reft-train; return its folder."""
    folder = out / f"{way.replace(' ', '_')}_{seed}"
    words = [
        *COMMON,
        *WAYS[way],
        f"data.path={path}",
        f"seed={seed}",
        f"hydra.run.dir={folder}",
        "resume=auto",
    ]
    subprocess.run([sys.executable, "-m", "reft_lightning.cli", *words], check=True)
    return folder


def losses(folder: Path) -> dict[str, Any]:
    """Return the mean training loss of the first and of the last ten steps, None of a way with one step."""
    with next(folder.glob("csv*/metrics.csv")).open(newline="", encoding="utf-8") as file:
        found = [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]
    if len(found) < 20:
        return {"steps": len(found), "first_ten": None, "last_ten": None}
    return {"steps": len(found), "first_ten": sum(found[:10]) / 10, "last_ten": sum(found[-10:]) / 10}


@torch.no_grad()
def length(reft: rl.ReftModel, tokenizer: Any, texts: Sequence[str]) -> float:
    """Return the median length of the edits over that of their hidden states, at the present scale."""
    found: list[float] = []

    def see(seen: Seen) -> None:
        found.extend(((seen.after - seen.before).norm(dim=-1) / seen.before.norm(dim=-1)).tolist())

    with watching(reft, see):
        for text in texts:
            ids = tokenizer(films.PROMPT + text, return_tensors="pt")["input_ids"]
            marks = torch.zeros_like(ids, dtype=torch.bool)
            marks[:, : len(tokenizer(films.PROMPT)["input_ids"])] = True
            reft(ids, attention_mask=torch.ones_like(ids), prompt_mask=marks)
    return statistics.median(found)


def measure(reft: rl.ReftModel, tokenizer: Any, judge: films.NaiveBayes, seed: int) -> dict[str, Any]:
    """Return concept and fluency of sampled texts, by kind of prompt."""
    line: dict[str, Any] = {}
    for kind, prompts in films.PROMPTS.items():
        texts = films.go_on(reft, tokenizer, prompts, TEXTS // len(prompts), seed)
        said = [text for new in texts for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
        values = [judge.score(text) for text in said]
        line[kind] = {
            "negative": sum(value < 0 for value in values) / len(values),
            "log_odds": sum(values) / len(values),
            "loss_by_base": films.cost(reft, tokenizer, prompts, texts),
            "examples": said[:2],
        }
    return line


def note(**line: Any) -> None:
    """Add a line to the results."""
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    short = {kind: (line[kind]["negative"], round(line[kind]["loss_by_base"], 2)) for kind in films.PROMPTS}
    print(line["way"], line["seed"], line["strength"], short, flush=True)


def run(options: argparse.Namespace) -> None:
    """Train and measure what is not in the results yet."""
    rows = films.read(options.data, "train")
    judge = films.NaiveBayes(rows)
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    done = {(line["way"], line["seed"], line["strength"]) for line in lines()}
    for seed in options.seeds:
        sides = [
            films.sentences(rows, label, options.rows, seed) for label in (films.NEGATIVE, films.POSITIVE)
        ]
        path = out / f"pairs_{seed}.jsonl"
        pairs = [{"question": films.PROMPT, "chosen": a, "rejected": b} for a, b in zip(*sides, strict=True)]
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
        folders = {way: train(way, seed, out, path) for way in WAYS if way in (options.ways or WAYS)}
        model, tokenizer = load_base_model(**model_source(compose(films.MODEL)))
        others = films.sentences(films.read(options.data, "dev"), films.POSITIVE, 16, seed)
        for way in ("frozen base", *folders, RANDOM):
            start = time.perf_counter()
            if way in folders:
                reft = rl.ReftModel.from_pretrained(model, folders[way] / "adapter").eval()
            else:
                reft = rl.attach(model, "bias", layers=[LAYER], positions="all").eval()
                torch.manual_seed(seed)
                with torch.no_grad():
                    torch.nn.init.normal_(reft.interventions[str(LAYER)][0].bias)
            reft.scale = 1.0
            one = length(reft, tokenizer, others)
            trained = losses(folders[way]) if way in folders else None
            for strength in STRENGTHS if way != "frozen base" else (0.0,):
                if (way, seed, strength) in done:
                    continue
                reft.scale = strength / one
                note(way=way, seed=seed, strength=strength, scale=reft.scale, length_at_1=one, trained=trained,
                     **measure(reft, tokenizer, judge, seed), seconds=time.perf_counter() - start)  # fmt: skip
            reft.detach()


def lines() -> list[dict[str, Any]]:
    """Return the points that were measured."""
    return (
        [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
        if RESULTS.is_file()
        else []
    )


def table() -> None:
    """Print the most negative point of each way, by seed, of the strengths below the first whose texts cost too much.

    Beyond it texts repeat themselves, which is fluent by this measure.
    """
    points, seeds = lines(), sorted({point["seed"] for point in lines()})
    print("| way | " + " | ".join(films.PROMPTS) + " |\n" + "|---" * (1 + len(films.PROMPTS)) + "|")
    for way in ("frozen base", *WAYS, RANDOM):
        cells = []
        for kind in films.PROMPTS:
            best = []
            for seed in seeds:
                own = [point for point in points if point["seed"] == seed]
                base = next(point[kind] for point in own if point["way"] == "frozen base")
                tried = sorted((p for p in own if p["way"] == way), key=lambda p: p["strength"])
                best.append(_most([p[kind] for p in tried], base))
            each = ", ".join(f"{100 * share:.0f}" for share in best)
            cells.append(f"{100 * statistics.mean(best):.0f} ({each})")
        print(f"| {way} | " + " | ".join(cells) + " |")


def _most(tried: Sequence[dict[str, Any]], base: dict[str, Any]) -> float:
    fluent = itertools.takewhile(lambda p: p["loss_by_base"] <= base["loss_by_base"] + BOUND, tried)
    return max((p["negative"] for p in fluent), default=base["negative"])


def plot() -> None:
    """Draw the curves: means over the seeds, and the points of each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = lines()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for axis, kind in zip(axes, films.PROMPTS, strict=True):
        base = [point for point in points if point["way"] == "frozen base"]
        zero = [statistics.mean(point[kind][name] for point in base) for name in ("loss_by_base", "negative")]
        axis.plot(*zero, "k*", markersize=12, label="frozen base")
        for i, way in enumerate((*WAYS, RANDOM)):
            own = [point for point in points if point["way"] == way]
            curve = [zero]
            for strength in STRENGTHS:
                at = [point[kind] for point in own if point["strength"] == strength]
                if at:
                    curve.append(
                        [statistics.mean(p[name] for p in at) for name in ("loss_by_base", "negative")]
                    )
                    axis.plot([p["loss_by_base"] for p in at], [p["negative"] for p in at], ".", color=f"C{i}",
                              markersize=3, alpha=0.5)  # fmt: skip
            axis.plot(*zip(*curve, strict=True), "o-", color=f"C{i}", label=way, markersize=4)
        axis.set_xlabel("loss of the texts by the frozen base, nats a token (fluent: low)")
        axis.set_title({"as trained": "the prompt of training", "others": "other prompts"}[kind])
    axes[0].set_ylabel("share of texts taken for negative")
    axes[1].legend(frameon=False)
    figure.savefig(HERE / "steering.png", dpi=110)


def main() -> None:
    """Measure, or draw what was measured."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--data", type=Path)
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--rows", type=int, default=240)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    arguments.add_argument("--ways", nargs="+")
    arguments.add_argument("--plot", action="store_true")
    options = arguments.parse_args()
    if options.plot:
        table()
        plot()
    elif options.data and options.out:
        run(options)
    else:
        arguments.error("give --data and --out, or --plot")


if __name__ == "__main__":
    main()
