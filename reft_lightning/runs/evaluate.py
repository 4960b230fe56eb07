"""Evaluate the adapter of an old run again: ``reft-eval run=FOLDER``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer, seed_everything

from ..adapters.saving import load_saved, load_state
from ..config.identity import config_hash
from ..config.schema import OptimizerConfig, SchedulerConfig
from ..storage.atomic import new_folder, now
from ..suggest import did_you_mean
from ..training.progress import RunProgress
from .arguments import method_of
from .build import build
from .console import print_table
from .devices import check_accelerator
from .environment import environment
from .experiment import evaluate_split
from .results import Results
from .run_folder import load_run_config
from .trainer import quiet_lightning

SPLITS = ("validation", "test")


def evaluate(folder: Path, split: str = "validation", limit: int | None = None) -> dict[str, Any]:
    """Evaluate the adapter of a run folder again, and write the scores to ``<folder>/evaluations``.

    Args:
        folder: a run folder.
        split: ``validation`` or ``test``; a read of the test split is added to the run's ``test_reads``.
        limit: rows (of each test task), or None for all.

    Raises:
        ValueError: for an unknown split, or a folder that is not a run.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be 'validation' or 'test'; got {split!r}{did_you_mean(split, SPLITS)}")
    config = load_run_config(folder)
    if limit is not None:
        limited = {"limit_test" if split == "test" else "limit_validation": limit}
        config = replace(config, data=replace(config.data, **limited))
    if split == "test" and config.sealed:
        raise ValueError(f"{folder} is part of a search, whose test split is sealed")
    check_accelerator(
        config.trainer.accelerator, f"set trainer.accelerator to cpu in {Path(folder) / 'config.yaml'}"
    )
    if split == "test":
        Results.read(folder)  # a damaged one, too; the read is noted there
    quiet_lightning()
    seed_everything(config.seed, workers=True, verbose=False)
    adapter = load_state(folder / "adapter")  # a missing one is reported before weights are loaded
    # nothing is trained: what the folder names for training is not imported
    untrained = replace(
        config, optimizer=OptimizerConfig(), scheduler=SchedulerConfig(), test=split == "test"
    )
    objects = build(untrained)
    load_saved(objects.model, folder / "adapter", adapter)
    target = new_folder(folder / "evaluations")
    results = Results(
        target, config_hash=config_hash(config), run_dir=str(folder), split=split, limit=limit, seed=config.seed,
        method=method_of(config), model=config.model.name, **objects.facts(), **environment(),
    )  # fmt: skip
    trainer = Trainer(
        accelerator=config.trainer.accelerator, devices=1, logger=False, enable_checkpointing=False,
        use_distributed_sampler=False, default_root_dir=target, precision=config.trainer.precision,
        enable_model_summary=False, callbacks=[RunProgress()],
    )  # fmt: skip
    torch.set_float32_matmul_precision(config.matmul_precision)
    results.update(matmul_precision=config.matmul_precision)
    try:
        evaluate_split(trainer, objects, split, target, results)
    finally:
        if split == "test":
            original = Results.read(folder)
            original.update(test_reads=[*original.values["test_reads"], *results.values["test_reads"]])
    results.update(status="complete", finished=now())
    print_table(results.values)
    return results.values
