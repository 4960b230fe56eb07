"""Does an edit of a small LLaVA teach it answers that it does not give, and where must the edit be?

    python experiments/vision/run.py [--out outputs/vision] [--seeds 42 43]

1. Pictures of one to four shapes of one kind and colour are drawn (`drawing.py`).
2. A LLaVA of random weights learns to count them and to say their colour and shape, each in one letter; all its weights
   are trained, in a loop of its own.
3. That model is frozen. Interventions learn three other questions from 300 rows ("Warm or icy?" r or b, "Many or few?"
   4 or 1, "Is it round?" c or x), at the text, at the images and in the connector; LoRA on the same rows and steps.

Writes `results.json`: of each method and seed the scores of the adapted model, and of the frozen one, on the same rows.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from drawing import Scene, scenes, write

from reft_lightning.config import compose
from reft_lightning.evaluation import Decoding, generate
from reft_lightning.runs import experiment
from reft_lightning.runs.build import build
from reft_lightning.training.objectives import inputs_of

HERE = Path(__file__).parent
MODEL = [
    "model=tiny_vision", "model.config.text_config.hidden_size=48", "model.config.text_config.intermediate_size=128",
    "model.config.vision_config.hidden_size=48", "model.config.vision_config.intermediate_size=96",
    "model.config.vision_config.num_attention_heads=4", "model.config.vision_config.image_size=42",
]  # fmt: skip
RUN = [
    "data=vqa", "data.template=plain", "decoding.max_new_tokens=3", "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false", "data.batch_size=32", "data.eval_batch_size=100", "logger=csv",
]  # fmt: skip
RATE = 4e-3  # of the base
LEARNING = [
    "trainer.max_epochs=12", "trainer.check_val_every_n_epoch=12", "data.validation_size=60", "evaluate_base=true",
]  # fmt: skip
RANK = "intervention.rank=4"
METHODS = {
    "loreft, f3+l3": ["intervention=loreft", RANK, "intervention.positions=f3+l3"],
    "loreft, l1": ["intervention=loreft", RANK, "intervention.positions=l1"],
    "loreft, image": ["intervention=loreft", RANK, "intervention.positions=image"],
    "loreft, image+f3+l3": ["intervention=loreft", RANK, "intervention.positions=image+f3+l3"],
    "mores, one image token, rank 1": ["intervention=mores"],
    "loreft, connector": [
        "intervention=loreft", RANK, "intervention.positions=image", "intervention.component=connector_output",
    ],
    "lora": [
        "intervention=peft/lora", "intervention.options.r=4",
        "intervention.options.target_modules='.*language_model.*(q_proj|v_proj)'",
    ],
}  # fmt: skip
RATES = {"lora": 5e-3}  # of all others 2e-2


def asked(scene: Scene, rng: random.Random, answers: Mapping[str, str]) -> tuple[Scene, str, str]:
    """Return a scene with one of some questions, and its answer."""
    question = rng.choice(list(answers))
    return scene, question, answers[question]


def known(scene: Scene) -> dict[str, str]:
    """Return what the base learns to answer."""
    return {
        "How many? ": str(scene.count),
        "Which colour? ": scene.colour[0],
        "Which shape? ": scene.shape[0],
    }


def new(scene: Scene) -> dict[str, str]:
    """Return what interventions learn to answer: other questions, in letters that the base has."""
    return {
        "Warm or icy? ": "r" if scene.colour in ("red", "yellow") else "b",
        "Many or few? ": "4" if scene.count > 2 else "1",
        "Is it round? ": "c" if scene.shape == "circle" else "x",
    }


def rows(count: int, seed: int, answers: Callable[[Scene], dict[str, str]]) -> list[tuple[Scene, str, str]]:
    """Return pictures with a question each; those of one seed are always the same."""
    rng = random.Random(seed)
    return [asked(scene, rng, answers(scene)) for scene in scenes(count, seed)]


def make_base(folder: Path, count: int, steps: int, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train a model from random weights to name pictures, save it with its processor, and return what it can.

    Args:
        folder: takes the rows, and the model in ``base``.
        count: pictures.
        steps: of 32 pictures.
        overrides: of the configuration.
    """
    place = write(folder / "known", {"train": rows(count, 1, known), "test": rows(200, 2, known)})
    objects = build(compose.compose([*MODEL, *RUN, "intervention=full", "data.validation_size=0",
                                     f"data.path={place}", *overrides]))  # fmt: skip
    data, model, run = objects.data, objects.model, objects.prepared
    data.setup("test")
    collate = data._collator(training=True)
    whole = collate(list(data.train_rows))  # each picture is processed once
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    warm = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    order = torch.Generator().manual_seed(0)
    for step in range(steps):
        chosen = torch.randint(count, (32,), generator=order)
        batch = {name: value[chosen] for name, value in whole.items() if isinstance(value, torch.Tensor)}
        loss = model(**inputs_of(batch | {"boundary": whole["boundary"]})).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warm.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    model.eval()
    examples = data._test["vision"]
    texts = generate(model, collate(list(examples)), run.tokenizer, Decoding(3))
    right = [text.strip() == row.example.answer for (text,), row in zip(texts, examples, strict=True)]
    model.base_model.save_pretrained(folder / "base")
    run.processor.save_pretrained(folder / "base")
    return {
        "parameters": run.count.base,
        "pictures": count,
        "steps": steps,
        "right": sum(right) / len(right),
    }


def learn(out: Path, name: str, seed: int, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train one method on the questions, and return its results."""
    config = compose.compose([
        "model=local", f"model.path={out / 'base'}", *RUN, *LEARNING, *METHODS[name],
        f"optimizer.lr={RATES.get(name, 2e-2)}", f"data.path={out / 'new'}", f"seed={seed}", *overrides,
    ])  # fmt: skip
    return experiment.run(config, out / f"{''.join(c if c.isalnum() else '_' for c in name)}_{seed}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/vision"), help="of runs; a base in it is used"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    given = parser.parse_args()
    out = given.out.absolute()
    if not (out / "base.json").is_file():
        base = make_base(out, count=2000, steps=1200)
        (out / "base.json").write_text(json.dumps(base), encoding="utf-8")
    if not (out / "new").is_dir():
        write(out / "new", {"train": rows(360, 3, new), "test": rows(200, 4, new)})
    found: dict[str, Any] = {
        "base": json.loads((out / "base.json").read_text(encoding="utf-8")),
        "methods": {},
    }
    print(found["base"], flush=True)
    for name in METHODS:
        runs = [learn(out, name, seed) for seed in given.seeds]
        found["methods"][name] = {
            "trainable_parameters": runs[0]["trainable_parameters"],
            "frozen": runs[0]["metrics"]["base/test/exact_match"],
            "exact_match": {str(run["seed"]): run["metrics"]["test/exact_match"] for run in runs},
        }
        print(name, found["methods"][name], flush=True)
        (HERE / "results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
