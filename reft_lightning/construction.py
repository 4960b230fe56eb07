"""From a configuration to objects: what is wrong is said before weights are loaded.

The order is the price of a mistake: the configuration, the interventions against a model without weights, the data,
and the weights last.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning import Trainer
from omegaconf import OmegaConf

from .attachment import attach, build_on_meta
from .base_models import load_base_model, load_config, load_tokenizer
from .callbacks import WandbReport, build_callbacks, build_loggers
from .data import FAMILIES
from .data.base import Example
from .data.module import FamilyDataModule
from .data.options import option_batches
from .data.rows import DataSource
from .interventions import intervention_class, nearest, settings_of
from .model import ParameterCount, ReftModel
from .module import FinetuningModule
from .optimization import Optimization
from .schema import Config, InterventionConfig

PLACE = ("source", "name", "path", "package", "sha256", "revision")  # where a model lies


@dataclass
class Objects:
    """What a configuration builds."""

    model: ReftModel
    data: FamilyDataModule
    module: FinetuningModule
    count: ParameterCount


def build(config: Config) -> Objects:
    """Build what a run needs, the weights last.

    Raises:
        ValueError: for an unknown family, task, model, layer, rank, position or setting, or missing data.
    """
    if config.data.family not in FAMILIES:
        raise ValueError(
            f"unknown family {config.data.family!r}; known: {', '.join(FAMILIES)}"
            f"{nearest(config.data.family, FAMILIES)}"
        )
    source = model_source(config)
    optimization = optimization_of(config)
    hf_config = load_config(**{k: source[k] for k in (*PLACE, "base_dropout", "config")})
    attach(build_on_meta(hf_config), **attachment(config))  # raises what attaching would, without weights
    tokenizer = load_tokenizer(**{k: source[k] for k in (*PLACE, "tokenizer")})
    data = FamilyDataModule(FAMILIES[config.data.family], tokenizer, **data_arguments(config))
    data.prepare_data()
    data.setup("fit")
    check_monitor(config, data.val_tasks)
    base_model, _ = load_base_model(**source)
    if config.model.gradient_checkpointing:
        with warnings.catch_warnings():
            # the name in all of transformers 5; 5.23 deprecates it for 6
            warnings.filterwarnings("ignore", ".*gradient_checkpointing_enable.*deprecated", FutureWarning)
            base_model.gradient_checkpointing_enable()
    model = attach(base_model, **attachment(config))
    model.config.base_model = config.model.name  # a folder of this machine means nothing elsewhere
    options = (
        partial(option_batches, tokenizer, max_length=data.max_length) if config.option_likelihood else None
    )
    module = FinetuningModule(
        model, tokenizer, data.family, data.val_tasks, data.test_tasks, optimization, options,
        config.data.max_new_tokens, commonest_answers(data.train_rows.examples),
    )  # fmt: skip
    module.train()  # Lightning starts training in the mode it finds; the base's dropout is 0 unless asked for
    # of the published model: a head in float32 has a copy of embeddings that it shares there
    count = attach(build_on_meta(base_model.config), **attachment(config)).parameter_count()
    return Objects(model, data, module, count)


def check_monitor(config: Config, tasks: Sequence[str]) -> None:
    """Refuse a monitored score that no validation will report.

    Raises:
        ValueError: for an unknown score, or early stopping without validation rows.
    """
    scores = ["accuracy", "option_accuracy"] if config.option_likelihood else ["accuracy"]
    known = ["val/loss", *(f"val/{s}" for s in scores), *(f"val/{t}/{s}" for t in tasks for s in scores)]
    name = config.callbacks.monitor
    if tasks and name not in known:
        raise ValueError(
            f"callbacks.monitor must be one of {', '.join(known)}; got {name!r}{nearest(name, known)}"
        )
    if not tasks and config.callbacks.early_stopping_patience is not None:
        raise ValueError(
            "early stopping needs validation rows: set data.validation_size, or no "
            "callbacks.early_stopping_patience"
        )


def commonest_answers(examples: Iterable[Example]) -> dict[str, str]:
    """Return the commonest answer of each task's training rows."""
    answers: dict[str, Counter[str]] = {}
    for example in examples:
        answers.setdefault(example.task, Counter())[example.answer] += 1
    return {task: counts.most_common(1)[0][0] for task, counts in answers.items()}


def model_source(config: Config) -> dict[str, Any]:
    """Return the arguments of :func:`load_base_model`."""
    model = OmegaConf.to_container(OmegaConf.structured(config.model))
    del model["gradient_checkpointing"]
    return model | {"seed": config.seed}


def attachment(config: Config) -> dict[str, Any]:
    """Return the arguments of :func:`attach`.

    A setting that the method's class does not take is left out where it stands at its default.
    """
    values = OmegaConf.to_container(OmegaConf.structured(config.intervention))
    options, defaults = values.pop("options"), InterventionConfig()
    taken = settings_of(intervention_class(values["method"]))
    for name in ("rank", "dropout", "dropout_on", "init"):
        if values[name] is None or (name not in taken and values[name] == getattr(defaults, name)):
            del values[name]
    if isinstance(values["layers"], dict):
        values["layers"] = {int(layer): own or {} for layer, own in values["layers"].items()}
    return values | options


def data_arguments(config: Config) -> dict[str, Any]:
    """Return the arguments of the DataModule."""
    values = OmegaConf.to_container(OmegaConf.structured(config.data))
    for name in ("family", "max_new_tokens"):
        del values[name]
    source = DataSource(
        values.pop("source"), *(values.pop(k) for k in ("path", "package", "sha256", "mixture"))
    )
    values["tasks"] = values["tasks"] or list(FAMILIES[config.data.family].tasks)
    return values | {"source": source, "seed": config.seed, "sealed": config.sealed}


def optimization_of(config: Config) -> Optimization:
    """Return the optimizer's settings."""
    o = config.optimizer
    return Optimization(
        lr=o.lr, weight_decay=o.weight_decay, betas=tuple(o.betas), eps=o.eps, schedule=o.schedule,
        warmup_ratio=o.warmup_ratio,
    )  # fmt: skip


def build_trainer(config: Config, folder: Path, values: dict[str, Any]) -> Trainer:
    """Return the Trainer with its callbacks and loggers."""
    arguments = OmegaConf.to_container(OmegaConf.structured(config.trainer))
    callbacks = build_callbacks(config.callbacks, folder, config.trainer.enable_progress_bar)
    if config.logger.wandb:
        callbacks.append(WandbReport())
    return Trainer(
        **arguments, default_root_dir=folder, callbacks=callbacks,
        logger=build_loggers(config.logger, folder, values), use_distributed_sampler=False,
        enable_model_summary=False,
    )  # fmt: skip


def quiet_lightning() -> None:
    """Keep Lightning's tips, device listings and a warning about its own code out of the log."""
    warnings.filterwarnings(
        "ignore", ".*LeafSpec.*", FutureWarning
    )  # lightning 2.6 calls what torch 2.13 deprecates
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
