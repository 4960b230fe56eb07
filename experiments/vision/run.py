"""Does an edit of a small LLaVA teach it answers that it does not give, and where must the edit be?

    python experiments/vision/run.py [--out outputs/vision] [--seeds 42 43 44]

1. Pictures of one to four shapes of one kind and colour are drawn (`drawing.py`).
2. A LLaVA of random weights learns to name them, all its weights trained: "three red circles".
3. That model is frozen. Interventions learn other questions from 300 rows ("How many?" 3; "Which colour?" red; "Is it
   round?" yes), at the text, at the images and in the connector; LoRA on the same rows and steps.

Writes `results.json`: of each method and seed the scores of the adapted model, and of the frozen one, on the same rows.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drawing import Scene, scenes, write

from reft_lightning.config import compose
from reft_lightning.runs import evaluate, experiment
from reft_lightning.runs.run_folder import load_run_config

HERE = Path(__file__).parent
MODEL = [
    "model=tiny_vision", "model.config.text_config.hidden_size=64", "model.config.text_config.intermediate_size=160",
    "model.config.text_config.num_hidden_layers=3", "model.config.vision_config.hidden_size=64",
    "model.config.vision_config.intermediate_size=128", "model.config.vision_config.num_hidden_layers=3",
    "model.config.vision_config.num_attention_heads=4", "model.config.vision_config.image_size=42",
]  # fmt: skip
RUN = [
    "data=vqa", "data.template=plain", "decoding.max_new_tokens=20", "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false", "data.batch_size=32", "data.eval_batch_size=100", "logger=csv",
]  # fmt: skip
NAMING = [
    "intervention=full", "optimizer.lr=2e-3", "trainer.max_epochs=10", "data.validation_size=100",
    "trainer.check_val_every_n_epoch=5",
]  # fmt: skip
LEARNING = [
    "trainer.max_epochs=20", "trainer.check_val_every_n_epoch=10", "data.validation_size=60", "evaluate_base=true",
]  # fmt: skip
RANK = "intervention.rank=4"
METHODS = {
    "loreft, f3+l3": ["intervention=loreft", RANK, "intervention.positions=f3+l3"],
    "loreft, l1": ["intervention=loreft", RANK, "intervention.positions=l1"],
    "loreft, image": ["intervention=loreft", RANK, "intervention.positions=image"],
    "loreft, image:0.34": ["intervention=loreft", RANK, "intervention.positions=image:0.34"],
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
RATES = {"lora": 3e-3}  # of all others 1e-2


def asked(scene: Scene, rng: random.Random) -> tuple[Scene, str, str]:
    """Return a scene with one of three questions and its answer."""
    answers = {
        "How many? ": str(scene.count),
        "Which colour? ": scene.colour,
        "Is it round? ": "yes" if scene.shape == "circle" else "no",
    }
    question = rng.choice(list(answers))
    return scene, question, answers[question]


def rows_of_naming(count: int) -> list[tuple[Scene, str, str]]:
    """Return what the base learns."""
    return [(scene, "Name it: ", scene.caption) for scene in scenes(count, 1)]


def rows_of_questions(count: int, seed: int) -> list[tuple[Scene, str, str]]:
    """Return what interventions learn."""
    rng = random.Random(seed)
    return [asked(scene, rng) for scene in scenes(count, seed)]


def make_base(out: Path, count: int, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train a base from random weights, save it with its processor in ``out/base``, and return its scores."""
    train, test = rows_of_naming(count), [(s, "Name it: ", s.caption) for s in scenes(200, 2)]
    rows = write(out / "naming", {"train": train, "test": test})
    config = compose.compose([*MODEL, *RUN, *NAMING, f"data.path={rows}", *overrides])
    results = experiment.run(config, out / "naming_run")
    objects = evaluate.load_run(out / "naming_run", load_run_config(out / "naming_run"))
    objects.model.base_model.save_pretrained(out / "base")
    objects.prepared.processor.save_pretrained(out / "base")
    return results


def learn(out: Path, name: str, seed: int, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train one method on the questions, and return its results."""
    config = compose.compose([
        "model=local", f"model.path={out / 'base'}", *RUN, *LEARNING, *METHODS[name],
        f"optimizer.lr={RATES.get(name, 1e-2)}", f"data.path={out / 'questions'}", f"seed={seed}", *overrides,
    ])  # fmt: skip
    return experiment.run(config, out / f"{''.join(c if c.isalnum() else '_' for c in name)}_{seed}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/vision"), help="of runs; a base in it is used"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43])
    given = parser.parse_args()
    out = given.out.absolute()
    if not (out / "base").is_dir():
        base = make_base(out, 5000)
        print("base", base["metrics"], flush=True)
        write(out / "questions", {"train": rows_of_questions(360, 3), "test": rows_of_questions(300, 4)})
    base = json.loads((out / "naming_run" / "results.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = {
        "base": {
            "parameters": base["base_parameters"],
            "steps": base["steps"],
            "naming": base["metrics"]["test/exact_match"],
        },
        "versions": base["versions"],
        "methods": {},
    }
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
