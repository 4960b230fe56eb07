"""Evaluate the adapter of an old run again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Trainer, seed_everything
from omegaconf import OmegaConf

from ..adapters.saving import load_state
from ..config.identity import config_hash
from ..config.user_paths import as_written
from ..speed.matmul_precision import matmul_precision
from ..storage.atomic import new_folder, now
from ..suggest import did_you_mean
from .arguments import method_of
from .build import build
from .console import print_table
from .devices import check_accelerator
from .environment import environment
from .experiment import _written, evaluate_split, load_run_config
from .results import Results
from .trainer import quiet_lightning


def evaluate(folder: Path, split: str = "validation", limit: int | None = None) -> dict[str, Any]:
    """Evaluate the adapter of a run folder again, and write the scores to ``<folder>/evaluations``.

    Args:
        folder: a run folder.
        split: ``validation`` or ``test``; a read of the test split is added to the run's ``test_reads``.
        limit: rows (of each test task), or None for all.

    Raises:
        ValueError: for an unknown split, or a folder that is no run.
    """
    if split not in ("validation", "test"):
        raise ValueError(
            f"split must be 'validation' or 'test'; got {split!r}{did_you_mean(split, ('validation', 'test'))}"
        )
    config = load_run_config(folder)
    name = "limit_test" if split == "test" else "limit_validation"
    if limit is not None:
        setattr(config.data, name, limit)
    if split == "test" and config.sealed:
        raise ValueError(f"{folder} is part of a search, whose test split is sealed")
    check_accelerator(
        config.trainer.accelerator, f"set trainer.accelerator to cpu in {Path(folder) / 'config.yaml'}"
    )
    quiet_lightning()
    seed_everything(config.seed, workers=True, verbose=False)
    adapter = load_state(folder / "adapter")  # a missing one is said before weights are loaded
    objects = build(config)
    objects.model.load_adapter_state_dict(adapter)
    target = new_folder(folder / "evaluations")
    values = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)
    results = Results(
        target,
        config_hash=config_hash(as_written(values, _written(folder, {}))),
        run_dir=str(folder),
        split=split,
        limit=limit,
        **environment(),
    )
    trainer = Trainer(
        accelerator=config.trainer.accelerator, devices=1, logger=False, enable_checkpointing=False,
        use_distributed_sampler=False, default_root_dir=target, precision=config.trainer.precision,
        enable_model_summary=False,
    )  # fmt: skip
    with matmul_precision(config.matmul_precision, trainer.strategy.root_device) as precision:
        results.update(matmul_precision=precision)
        evaluate_split(trainer, objects, split, target, results, "")
    if split == "test":
        original = Results.read(folder)
        original.update(test_reads=[*original.values["test_reads"], *results.values["test_reads"]])
    results.update(
        status="complete", finished=now(), method=method_of(config), model=config.model.name,
        seed=config.seed, data_versions=objects.data.data_versions, decoding=objects.decoding,
        trainable_parameters=objects.count.trainable, percent=objects.count.percent,
        head_parameters=objects.head_parameters, commonest_answers=objects.commonest,
    )  # fmt: skip
    print_table(results.values)
    return results.values
