"""Evaluate the adapter of an earlier run again: ``reft-eval run=FOLDER``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer, seed_everything
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.loggers import Logger

from ..adapters.saving import load_saved, load_state
from ..config.identity import config_hash
from ..config.schema import Config
from ..storage.atomic import new_folder, now, release_folder
from ..suggest import did_you_mean
from ..training.progress import RunProgress
from ..training.wandb import WandbReport, finish_wandb, wandb_runs
from .arguments import method_of, untrained
from .build import Objects, Prepared, build, prepare
from .console import print_table
from .devices import check_accelerator
from .environment import environment
from .experiment import evaluate_split
from .other_rows import on_other_rows, place_of_tests, train_questions, whole_file
from .results import Results
from .run_folder import at_commit, hold, load_run_config, warn_of_other_base, write_run_config
from .stopping import signal_of
from .trainer import evaluation_loggers, quiet_lightning

SPLITS = ("validation", "test")


def evaluate(
    folder: Path,
    split: str = "validation",
    limit: int | None = None,
    rows: Sequence[str] = (),
    evaluate_base: bool = False,
) -> dict[str, Any]:
    """Evaluate the adapter of a run folder again, and write the scores to ``<folder>/evaluations``.

    Args:
        folder: a run folder.
        split: ``validation`` or ``test``; a read of the test split is added to the run's ``test_reads``.
        limit: number of rows (per test task), or None for all.
        rows: arguments that choose rows other than the run's, see :func:`.other_rows.on_other_rows`.
        evaluate_base: whether to evaluate the frozen base as well.

    Raises:
        ValueError: for an unknown split, or a folder that is not a run.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be 'validation' or 'test'; got {split!r}{did_you_mean(split, SPLITS)}")
    try:
        return _evaluate(folder, split, limit, rows, evaluate_base)
    finally:
        release_folder(folder)


def _evaluate(
    folder: Path, split: str, limit: int | None, rows: Sequence[str], evaluate_base: bool
) -> dict[str, Any]:
    own = load_run_config(folder)
    if split == "test":
        if own.sealed:
            raise ValueError(f"{folder} is part of a search, whose test split is sealed")
        Results.read(folder)  # fail now if the file is damaged: the read is recorded in it
        hold(folder)  # a run in progress would overwrite the record
    config, plan = _with_rows(folder, own, split, limit, rows)
    objects = load_run(folder, config, plan)
    target = new_folder(folder / "evaluations")
    write_run_config(target, config)  # reft-report compares evaluations as it compares runs
    results = Results(
        target, config_hash=config_hash(config), run_dir=str(folder.absolute()), split=split, limit=limit,
        seed=config.seed, method=method_of(config), model=config.model.name, evaluation_dir=str(target.absolute()),
        **objects.facts(), **environment(),
    )  # fmt: skip
    loggers = evaluation_loggers(config, folder, target, split)
    shown = [WandbReport(folder, *objects.prepared.monitor)] if loggers else []
    trainer = evaluating_trainer(config, target, loggers=loggers, callbacks=shown)
    results.update(matmul_precision=config.matmul_precision)
    wandb_runs(loggers)  # started before rows are read: if W&B cannot be reached, no read is recorded
    try:
        if evaluate_base:
            with objects.model.disabled():
                evaluate_split(trainer, objects, split, target, results, base=True)
        evaluate_split(trainer, objects, split, target, results)
    except BaseException as error:
        ending = signal_of(error, trainer)
        results.update(status="stopped", error=repr(error), signal=ending and ending.name)
        finish_wandb(loggers, results.values, exit_code=128 + ending if ending else 1)
        raise
    finally:
        if split == "test":
            original, reads = Results.read(folder), results.values["test_reads"]
            place = place_of_tests(config.data)
            if place != place_of_tests(own.data):  # other rows, possibly under the same task name
                reads = [read | {"task": f"{read['task']} of {place}"} for read in reads]
            original.update(test_reads=[*original.values["test_reads"], *reads])
    results.update(status="complete", finished=now())
    print_table(results.values)
    finish_wandb(loggers, results.values)
    return results.values


def _with_rows(
    folder: Path, own: Config, split: str, limit: int | None, rows: Sequence[str]
) -> tuple[Config, Prepared]:
    """Return a run's configuration with the rows to evaluate, and what is prepared from it."""
    config = whole_file(on_other_rows(own, rows), split) if rows else own
    trained_on = train_questions(own) if rows else None
    if limit is not None:
        limited = {"limit_test" if split == "test" else "limit_validation": limit}
        config = replace(config, data=replace(config.data, **limited))
    config = replace(config, test=split == "test")
    plan = prepare(untrained(at_commit(config, folder)), trained_on=trained_on)
    if split == "validation" and not plan.data.val_tasks:
        whose, key = (rows[0], "data.validation_path") if rows else (folder, "data.validation_size")
        raise ValueError(f"{whose} has no validation rows ({key}): evaluate it with split=test")
    if split == "test" and not plan.data.test_tasks:
        raise ValueError(f"{rows[0] if rows else folder} has no test rows (data.test_path)")
    return config, plan


def load_run(folder: Path, config: Config, plan: Prepared | None = None) -> Objects:
    """Build a run with the adapter in its folder; the configuration may choose other rows to evaluate."""
    check_accelerator(
        config.trainer.accelerator, f"set trainer.accelerator to cpu in {Path(folder) / 'config.yaml'}"
    )
    quiet_lightning()
    seed_everything(config.seed, workers=True, verbose=False)
    adapter = load_state(folder / "adapter")  # a missing one is reported before weights are loaded
    objects = build(untrained(at_commit(config, folder)), plan)
    warn_of_other_base(folder, objects.fingerprint)
    load_saved(objects.model, folder / "adapter", adapter)
    return objects


def evaluating_trainer(
    config: Config,
    folder: Path,
    progress_bar: bool = True,
    loggers: Sequence[Logger] = (),
    callbacks: Sequence[Callback] = (),
) -> Trainer:
    """Return a trainer that only evaluates, on one device, with the run's numerical settings."""
    torch.set_float32_matmul_precision(config.matmul_precision)
    return Trainer(
        accelerator=config.trainer.accelerator, devices=1, logger=list(loggers),
        callbacks=[*callbacks, *([RunProgress()] if progress_bar else [])], enable_checkpointing=False,
        use_distributed_sampler=False, default_root_dir=folder, precision=config.trainer.precision,
        enable_model_summary=False, enable_progress_bar=progress_bar, plugins=LightningEnvironment(),
    )  # fmt: skip
