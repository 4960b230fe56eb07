"""Runs of a few steps of a tiny random model on invented rows, for tests of everything around training."""

import csv
import json
import logging
import random
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from lightning import Trainer
from PIL import Image

from reft_lightning.base_models.loading import byte_tokenizer
from reft_lightning.config import compose
from reft_lightning.runs import experiment

WORDS = ("zorb", "fenk", "mivle", "varr", "tull", "snide", "quab", "olp")
NAMES = {"boolq": ("true", "false"), "piqa": ("solution1", "solution2")}


def write_rows(folder, train=24, test=6, tasks=("boolq",), answer=None):
    """Write invented rows in the layout of LLM-Adapters; ``answer`` gives all rows the same one."""
    for task in tasks:
        (folder / task).mkdir(parents=True)
        for split, count in (("train", train), ("test", test)):
            rows = [_row(task, split, i, answer) for i in range(count)]
            (folder / task / f"{split}.json").write_text(json.dumps(rows))
    return folder


def _row(task, split, i, answer):
    rng = random.Random(f"{task} {split} {i}")
    names = NAMES[task]
    gold = answer or rng.choice(names)
    question = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 6)))
    return {
        "instruction": f"is {question} {split} {i} kept?\n\nAnswer format: {'/'.join(names)}",
        "input": "",
        "output": f"the correct answer is {gold}",
        "answer": gold,
    }


def arguments(data):
    """Return the overrides of a short run."""
    return [
        "model=tiny_random", "data=boolq", "data.source=local", f"data.path={data}",
        "data.validation_size=6", "data.batch_size=3", "data.eval_batch_size=4", "decoding.max_new_tokens=3",
        "intervention.rank=2", "intervention.positions=f2+l2", "trainer.accelerator=cpu",
        "trainer.max_epochs=2", "trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false", "optimizer.lr=5e-3",
    ]  # fmt: skip


def without_interventions(data):
    """Return the overrides of a short run of another method."""
    return [text for text in arguments(data) if not text.startswith("intervention.")]


def config(data, *overrides):
    """Compose a short run: 18 train rows are 6 steps an epoch, 6 rows validate, 6 test."""
    return compose.compose([*arguments(data), *overrides])


def run(data, folder, *overrides):
    """Run it; return the contents of results.json."""
    return experiment.run(config(data, *overrides), Path(folder))


def save_model(folder, factor=1.0):
    """Save a tiny Llama with the byte tokenizer, its weights multiplied by a factor."""
    model = tiny.model("llama", vocab_size=259)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= factor
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def run_on_colours(rows, folder):
    """Run on pictures of one colour, which are drawn into a folder of rows."""
    lines = []
    for i, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (28, 28), colour).save(rows / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "question": "Which colour?", "answers": [colour]}))
    (rows / "train.jsonl").write_text("\n".join(lines))
    settings = compose.compose([
        "model=tiny_vision", "data=vqa", f"data.path={rows}", "data.validation_size=1", "data.batch_size=3",
        "decoding.max_new_tokens=4", "intervention=loreft", "intervention.positions=image+l1",
        "trainer.accelerator=cpu", "trainer.max_epochs=2", "trainer.enable_progress_bar=false",
        "optimizer.lr=0.3",
    ])  # fmt: skip
    experiment.run(settings, folder)


def interrupt(data, folder, batch, *overrides, where="training_step"):
    """Run it until it stops in the ``batch``-th call, counted from 0, of a method of the module."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, batch, where)
        with pytest.raises(Stop):
            run(data, folder, *overrides)


def trainer(**settings):
    """Return a Trainer of Lightning's on the CPU that writes and says nothing."""
    quiet = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "max_epochs": 1,
        "enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False,
        "num_sanity_val_steps": 0, "log_every_n_steps": 1,
    }  # fmt: skip
    return Trainer(**quiet | settings)


def build(data, *overrides):
    """Build its objects, with the seed that a run sets."""
    settings = config(data, *overrides)
    torch.manual_seed(settings.seed)
    return experiment.build(settings)


def checkpoint(folder, name="last"):
    """Read a checkpoint of a run folder."""
    return torch.load(Path(folder) / "checkpoints" / f"{name}.ckpt", weights_only=False)


def results(folder):
    """Read results.json."""
    return json.loads((Path(folder) / "results.json").read_text())


def predictions(folder, name):
    """Read the predictions of one evaluation."""
    lines = (Path(folder) / "predictions" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def logged(folder, column):
    """Read step -> value of one column of the CSV logs, of all parts of the run."""
    found = {}
    for part in sorted(Path(folder).glob("csv*/metrics.csv")):
        with open(part, newline="") as file:
            found |= {int(row["step"]): float(row[column]) for row in csv.DictReader(file) if row.get(column)}
    return found


@contextmanager
def log_kept():
    """Take away what Hydra adds to the log inside the block: it writes to a run folder, and to streams of one test."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        for handler in set(root.handlers) - set(handlers):
            root.removeHandler(handler)
            handler.close()
        root.setLevel(level)


class Stop(RuntimeError):
    """What the tests stop a run with."""


def stop_at(monkeypatch, batch, where="training_step"):
    """Raise in the ``batch``-th call, counted from 0, of a method of the module."""
    from reft_lightning.training.generation import GenerationModule

    original, calls = getattr(GenerationModule, where), SimpleNamespace(count=0)

    def counted(self, *args, **kwargs):
        calls.count += 1
        if calls.count == batch + 1:
            if where == "training_step":
                original(self, *args, **kwargs)  # the failure comes when random numbers were drawn
            raise Stop(f"stopped in call {batch} of {where}")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GenerationModule, where, counted)
