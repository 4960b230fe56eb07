"""Run folders as reft-train leaves them, with invented rows and scores, for tests of reports; and what they report."""

import csv
import json
from collections import defaultdict
from functools import cache

import numpy as np
import pytest
from omegaconf import OmegaConf

from reft_lightning.config.identity import config_hash
from reft_lightning.config.schema import Config
from reft_lightning.reporting.build import build_report
from reft_lightning.reporting.page import page

MEASURE = "accuracy"
FEW = 400  # resamples, where no digit of theirs is looked at


@cache
def _defaults():
    return OmegaConf.structured(Config)


def right(rate, rows=60, seed=0):
    """Return invented right (1) and wrong (0) answers; the same rows are hard for every rate."""
    hard = np.random.default_rng(17).random(rows)
    own = np.random.default_rng([seed, 3]).random(rows)
    return (0.7 * hard + 0.3 * own < rate).astype(int).tolist()


def predictions(task, scores, measure=MEASURE):
    """Return one row for each example."""
    return [
        {"task": task, "source": f"{task}.json, row {i}", "prompt": f"row {i}?", "generated": "x", "answer": "yes",
         "gold": "yes", "scores": {measure: score}}
        for i, score in enumerate(scores)
    ]  # fmt: skip


def write_run(
    folder, method="loreft", seed=42, scores=None, *, split="test", base=None, rows=None, metrics=None, settings=None,
    data="one", adapter=1000, **values,
):  # fmt: skip
    """Write a run folder; return it.

    Args:
        folder: its place.
        method: name.
        seed: of the run.
        scores: task -> scores of rows; the metrics are their means.
        split: that the scores are of.
        base: the same of the frozen base.
        rows: rows of predictions instead of those made from the scores.
        metrics: instead of the means, or in addition to them.
        settings: dotted key -> value of the configuration.
        data: stands for the data's fingerprint.
        adapter: bytes; None for no file.
        values: of results.json.
    """
    scores = {"boolq": right(0.6)} if scores is None else scores
    folder.mkdir(parents=True)
    config = _defaults().copy()
    config.model.name, config.intervention.method, config.seed = "tiny", method, seed
    config.data.tasks = list(scores)
    for key, value in (settings or {}).items():
        OmegaConf.update(config, key, value)
    OmegaConf.save(config, folder / "config.yaml")
    prefix = "test" if split == "test" else "val"
    found = {f"{prefix}/{task}/{MEASURE}": float(np.mean(row)) for task, row in scores.items()}
    found |= {f"base/{prefix}/{task}/{MEASURE}": float(np.mean(row)) for task, row in (base or {}).items()}
    facts = {task: {"rows": 60, "fingerprint": f"{task} {data}"} for task in scores}
    results = {
        "status": "complete", "method": method, "model": "tiny", "seed": seed, "metrics": found | (metrics or {}),
        "counts": {}, "tasks": {task: {"kind": "generation"} for task in scores}, "monitor": f"val/{MEASURE}",
        "data_versions": {
            "family": "commonsense", "version": 1, "template": "plain", "split_seed": 42, "train": facts,
            "test": facts, "split": {"train_rows": 100, "train_fingerprint": data},
        },
        "trainable_parameters": 4000, "base_parameters": 100_000, "percent": 4.0, "head_parameters": 0, "steps": 50,
        "tokens": 5000, "train_seconds": 10.0, "tokens_per_second": 500.0, "peak_memory_bytes": 2**30,
        "versions": {"torch": "2.13.0"}, "git_commit": "abc", "device": "CPU",
        "config_hash": config_hash(OmegaConf.to_container(config)), "finished": "2026-01-01T01:00:00",
        "test_reads": [
            {"task": task, "rows": len(row), "time": "2026-01-01T00:00:00", "model": "adapted"}
            for task, row in scores.items() if split == "test"
        ],
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results | values))
    for who, what in (("reft", scores), ("base", base)):
        if what is not None:
            lines = rows if rows is not None and who == "reft" else [
                row for task, row_scores in what.items() for row in predictions(task, row_scores)
            ]  # fmt: skip
            path = folder / "predictions" / f"{who}_{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    if adapter is not None:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "reft.safetensors").write_bytes(b"\0" * adapter)
    _write_curve(folder / "csv", seed)
    return folder


def _write_curve(folder, seed):
    folder.mkdir()
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "train/loss", "val/accuracy"])
        writer.writeheader()
        for step in (9, 19, 29, 39, 49):
            writer.writerow({"step": step, "train/loss": 1 / (step + seed % 7)})
        for step in (24, 49):
            writer.writerow({"step": step, "val/accuracy": 0.4 + step / 200})


def write_grid(folder, rates=None, seeds=(42, 43, 44), **values):
    """Write one run a method and seed; return the folder."""
    for method, rate in (rates or {"loreft": 0.75, "red": 0.5}).items():
        for seed in seeds:
            run = {"scores": {"boolq": right(rate, seed=seed)}} | values
            write_run(folder / f"{method}_{seed}", method, seed, **run)
    return folder


def invented_trial(value, **params):
    """Return a complete trial of Optuna, of parameters between 0 and 1."""
    optuna = pytest.importorskip("optuna", reason="studies take the extra 'search'")
    space = dict.fromkeys(params, optuna.distributions.FloatDistribution(0, 1))
    return optuna.trial.create_trial(value=value, params=params, distributions=space)


def report(*folders, **options):
    return build_report(folders, resamples=options.pop("resamples", FEW), **options)


def shown(made):
    """Return the page of a report, without the plots, which take long to draw."""
    return page(made, defaultdict(dict))


def only(folder, **options):
    """Return the one comparison that a folder's runs make."""
    (comparison,) = report(folder, **options).comparisons
    return comparison


def method(comparison, label):
    return next(method for method in comparison.methods if method.label == label)


def cells(table, label, column):
    """Return the text of one cell: of the line that begins with the label."""
    row = next(row for row in table.rows if row[0].text == label)
    return row[list(table.columns).index(column)].text
