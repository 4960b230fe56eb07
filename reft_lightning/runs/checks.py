"""Checks of a configuration beyond those of its objects' arguments.

Most need the benchmark family; none needs weights. Each raises a ``ValueError`` that says what to write instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from lightning import Callback, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from ..adapters.methods import method_named
from ..adapters.reft.positions import parse_positions
from ..base_models.decoders import is_decoder
from ..config.schema import SHARDING, Config, DecodingConfig, ObjectiveConfig
from ..data import AnyFamily, Family
from ..data.benchmark_data import BenchmarkData
from ..data.example import Example
from ..evaluation import Decoding
from ..interventions import intervention_class
from ..suggest import check_choice
from ..training.module import limited
from ..training.sharded_base import ShardedBase
from .arguments import attachment, needs_marks, objective_of, positions_of
from .kinds import kind_of

UNFIT_CALLBACKS: dict[type[Callback], str] = {
    WeightAveraging: "also averages the frozen base, whose weights rounding would change, and its checkpoints would "
    "contain no adapter: leave it out",
    ModelPruning: "sets weights of the frozen base to 0, so the saved adapter would be scored on a different base than "
    "the one it is loaded onto: leave it out",
    BackboneFinetuning: "trains the base from some epoch on, which no adapter can store: intervention=full trains all "
    "of it from the start",
    OnExceptionCheckpoint: "makes Lightning start any run from the file that an earlier one left there: an interrupted "
    "run writes last.ckpt, and reft-train resume=FOLDER continues from it; leave it out",
    LearningRateFinder: "sets the learning rate itself, so the run would not match its configuration: try several with "
    "-m optimizer.lr=1e-4,1e-3, or use reft-search",
    BatchSizeFinder: "sets the batch size itself, so the run would not match its configuration: set data.batch_size, "
    "and trainer.accumulate_grad_batches if it does not fit into memory",
}


PACKAGES = ("lightning.", "reft_lightning.")  # packages whose callbacks log only names known here
LOGGED = ("train/", "progress/", "edit/")  # prefixes of names logged in training


class Monitor(NamedTuple):
    """The validation score that decides which checkpoint counts."""

    name: str
    mode: str  # max | min


def monitor_of(config: Config, family: AnyFamily) -> Monitor:
    """Return the score that decides: ``checkpoint.monitor``, else the family's main metric."""
    main = family.main_measure(config.data.tasks)
    if kind_of(family).generates and objective_of(config).pairs and family.measures_of(config.data.tasks):
        main = "option_accuracy"
    if main == "option_accuracy" and not config.option_likelihood:
        main = "loss"
    name = config.checkpoint.monitor or f"val/{main}"
    return Monitor(name, config.checkpoint.mode or ("min" if name.endswith("loss") else "max"))


def _check_closed_form(config: Config) -> None:
    """Refuse a closed-form objective whose trainer and optimizer do not take its single step."""
    if not objective_of(config).closed_form:
        return
    optimizer, trainer = config.optimizer, config.trainer
    wanted = {
        "optimizer=closed_form": (optimizer._target_, optimizer.lr, optimizer.options) == ("torch.optim.SGD", 1.0, {}),
        "scheduler=constant": config.scheduler.warmup_ratio == 0 and config.scheduler._target_.endswith(".constant"),
        "trainer=closed_form": trainer.max_epochs == 1 and trainer.accumulate_grad_batches > 1000
        and trainer.gradient_clip_val is None,
        "callbacks without a penalty's schedule": "penalties" not in str(config.callbacks),
        "intervention.beside=null": config.intervention.beside is None,
        "intervention.init_from=null": config.intervention.init_from is None,
    }  # fmt: skip
    if other := next((key for key, holds in wanted.items() if not holds), None):
        raise ValueError(
            f"{config.objective._target_} is solved by a single step over all rows: it needs {other}"
        )


def check_unused(config: Config, family: AnyFamily) -> None:
    """Refuse settings that would have no effect."""
    method, kind, objective = method_named(config.intervention.method), kind_of(family), objective_of(config)
    if config.model.compile and not method.compiles:
        raise ValueError(f"model.compile compiles interventions, not {method.name}: leave it out")
    if method.takes_source != bool(config.data.source_prompt):
        raise ValueError(
            f"{method.name} uses hidden states of other texts: name their column, such as data.source_prompt=source"
            if method.takes_source
            else f"data.source_prompt does not apply to {method.name}, which uses no hidden states of other texts: "
            "choose intervention=das, boundless_das or cdas, or leave it out"
        )
    if (objective.pairs or objective.rewards) and (config.data.source_prompt or kind.sees):
        what = "pictures" if kind.sees else "data.source_prompt"
        raise ValueError(f"{config.objective._target_} compares two answers and does not support {what}")
    if config.model.gradient_checkpointing and method.needs_cache:
        raise ValueError(
            f"{method.name} works through the key/value cache, which gradient checkpointing disables: leave out "
            "model.gradient_checkpointing"
        )
    if config.model.quantization and method.trains_weights:
        raise ValueError(
            f"{method.name} trains the weights that model.quantization quantizes: leave one of the two out"
        )
    _check_kept(config)
    if kind.generates:
        _check_closed_form(config)
    if needs_marks(config.intervention) and not config.data.marks:
        raise ValueError(
            "the positions `given` need marked words: mark the words to edit in the prompts of your own rows, and name "
            """the marks, such as 'data.marks=["<<",">>"]'; or write prompt:S for a share of the prompt"""
        )
    if config.data.marks and (config.data.source_prompt or objective.rewards):
        what = "data.source_prompt" if config.data.source_prompt else config.objective._target_
        raise ValueError(f"data.marks cannot be used with {what}: leave it out")
    if not kind.prompts:
        _check_promptless(config, family)
    if config.checkpoint.early_stopping_patience is not None and config.trainer.enable_checkpointing is False:
        raise ValueError(
            "checkpoint.early_stopping_patience needs checkpoints, but trainer.enable_checkpointing=false writes none: "
            "leave one of the two out"
        )
    if not kind.generates:
        if changed := _changed(config.decoding):
            raise ValueError(
                f"decoding.{changed[0]} does not apply to {family.name}, which trains a classifier: leave it out"
            )
        if config.objective != ObjectiveConfig() and not objective.rewards:
            raise ValueError(
                f"objective: {family.name} trains a classifier with the loss of its labels; leave it out"
            )
    elif config.decoding.samples > 1 and not family.measures_of(config.data.tasks):
        raise ValueError(
            f"decoding.samples={config.decoding.samples}: {family.name} has no scorer, and a judge reads one text per "
            "instruction; leave it out"
        )
    if config.optimizer.head_lr is not None and not attachment(config, family)["heads"]:
        raise ValueError(
            "optimizer.head_lr: no head is trained; leave it out, or name a head in intervention.heads"
        )


def _check_promptless(config: Config, family: AnyFamily) -> None:
    """Refuse settings that need a prompt if rows have none (``data.target`` without ``data.prompt``)."""
    method = method_named(config.intervention.method)
    what = f"the rows of {family.name} are texts without a prompt, as data.prompt is not set"
    if method.takes_settings:
        specs = {spec: parse_positions(spec) for spec in positions_of(config.intervention)}
        if needy := next((spec for spec, positions in specs.items() if positions.needs_prompt), None):
            raise ValueError(
                f"{what}, but the positions {needy} need a prompt: write intervention.positions=all"
            )
        if intervention_class(method.name).defines("edit_rows"):
            raise ValueError(f"{what}, but {method.name} needs prompts: choose another intervention")
    if objective_of(config).pairs:
        raise ValueError(
            f"{what}, but {config.objective._target_} compares two answers to a prompt: leave it out"
        )
    if changed := _changed(config.decoding):
        raise ValueError(f"{what}, so nothing is generated: leave out decoding.{changed[0]}")


def _changed(decoding: DecodingConfig) -> list[str]:
    return [name for name, default in vars(DecodingConfig()).items() if getattr(decoding, name) != default]


def check_reads_forward(config: Config, hf_config: PretrainedConfig, task: str, family: AnyFamily) -> None:
    """Reject encoders and unsupported encoder-decoders for generative tasks, and models that cannot read the rows."""
    sees = type(hf_config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if task == "image_text_to_text" and not sees:
        raise ValueError(
            f"model {config.model.name} ({hf_config.model_type}) does not read images, but the rows of the family "
            f"{family.name} have pictures: choose a model that does, such as model=smolvlm_256m"
        )
    if task in ("causal_lm", "seq2seq_lm") and sees and not is_decoder(hf_config):
        raise ValueError(
            f"model {config.model.name} ({hf_config.model_type}) reads images and text, but the rows of the family "
            f"{family.name} have no pictures: choose data=vqa or data=llava, or a text model"
        )
    if task == "seq2seq_lm":
        _check_two_texts(config)
    if not kind_of(family).prompts and hf_config.is_encoder_decoder:
        raise ValueError(
            f"model {config.model.name} ({hf_config.model_type}) has an encoder and a decoder, but texts without a "
            "prompt need a decoder-only model: choose one, or set data.prompt"
        )
    if task == "causal_lm" and hf_config.is_encoder_decoder:
        raise ValueError(
            f"model {config.model.name} ({hf_config.model_type}) has an encoder and a decoder, but is not one of "
            f"transformers' text-to-text models: choose one, or a decoder, for the rows of {family.name}"
        )
    if task == "causal_lm" and not is_decoder(hf_config):
        raise ValueError(
            f"model {config.model.name} is an encoder, whose tokens attend to later ones: it cannot be trained to "
            f"generate text (family {family.name}). Choose a data=glue_... file, or a decoder."
        )


def _check_two_texts(config: Config) -> None:
    """Refuse settings that need prompt and target in one sequence."""
    refused = {
        f"objective={config.objective._target_}": config.objective != ObjectiveConfig(),
        f"data.source_prompt={config.data.source_prompt}": bool(config.data.source_prompt),
        f"data.marks={config.data.marks}": bool(config.data.marks),
        "model.compile=true": config.model.compile,
        f"kept.limit_gb={config.kept.limit_gb}": bool(config.kept.limit_gb),
    }
    if given := next((what for what, holds in refused.items() if holds), None):
        raise ValueError(
            f"{given} needs a model that reads prompt and target as one sequence, but {config.model.name} has an "
            "encoder and a decoder: leave it out"
        )


def reported(family: Family, example: Example, decoding: Decoding) -> tuple[str, ...]:
    """Return the measures that a family's scorer gives for the number of samples generated.

    Raises:
        ValueError: if it gives a measure that the family does not declare.
    """
    if family.score is None:
        return ()
    found = tuple(family.score([example.target] * decoding.samples, example).scores)
    for name in found:
        if name not in family.measures:
            raise ValueError(
                f"the scorer of {family.name} returns {name!r}, which is not among its measures {family.measures}"
            )
    return (*found, *(["option_accuracy"] if example.options else []))


def _check_kept(config: Config) -> None:
    limit, method = config.kept.limit_gb, method_named(config.intervention.method)
    reasons = {
        f"{config.objective._target_} runs its own passes": config.objective != ObjectiveConfig(),
        f"{method.name} trains weights of all layers": method.trains_all_layers,
        "intervention.beside trains weights of all layers": bool(config.intervention.beside),
        "model.base_dropout=true changes every activation": config.model.base_dropout,
        "model.gradient_checkpointing=true recomputes them all": config.model.gradient_checkpointing,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if limit and reason:
        raise ValueError(f"kept.limit_gb={limit} has no effect: {reason}; leave one of the two out")


def check_monitor(config: Config, name: str, measures: Sequence[str], tasks: Sequence[str]) -> None:
    """Refuse a monitored score that no validation will report, including those of callbacks.

    Callbacks are not checked if one is the user's own, since what it logs is unknown.
    """
    scores = [name for name in measures if name != "option_accuracy" or config.option_likelihood]
    known = ["val/loss", *(f"val/{s}" for s in scores), *(f"val/{t}/{s}" for t in tasks for s in scores)]
    if tasks:
        check_choice("checkpoint.monitor", name, known)
    validates = bool(tasks) and config.trainer.limit_val_batches != 0
    rows = "validation rows: set data.validation_size"
    if tasks:
        rows = "validations: leave out trainer.limit_val_batches=0"
    if not validates and config.checkpoint.early_stopping_patience is not None:
        raise ValueError(f"early stopping needs {rows}, or leave out checkpoint.early_stopping_patience")
    entries = {key: entry for key, entry in config.callbacks.items() if isinstance(entry, Mapping)}
    if not all(str(entry.get("_target_")).startswith(PACKAGES) for entry in entries.values()):
        return
    for key, entry in entries.items():
        monitor = entry.get("monitor")
        if monitor is None or str(monitor).startswith(LOGGED):
            continue
        if not validates:
            raise ValueError(f"callbacks.{key}.monitor={monitor} needs {rows}")
        check_choice(f"callbacks.{key}.monitor", monitor, known)


def check_batches(config: Config, data: BenchmarkData, world_size: int) -> None:
    """Refuse a fraction of a split below one batch, and a validation interval longer than an epoch."""
    trainer, sizes = config.trainer, config.data
    if trainer.fast_dev_run:
        return
    train_key = val_key = "overfit_batches"
    if not trainer.overfit_batches:
        train_key, val_key = "limit_train_batches", "limit_val_batches"
    batches = math.ceil(len(data.train_rows) / (sizes.batch_size * world_size))
    counts = [(train_key, batches)]
    for key, rows in (
        *((val_key, len(loader.dataset)) for loader in cast(Any, data.val_dataloader())),
        *(("limit_test_batches", count) for count in data.test_rows.values()),
    ):
        counts.append((key, math.ceil(rows / (sizes.eval_batch_size * world_size))))
    for key, count in counts:
        limit = getattr(trainer, key)
        if limit and count and limited(count, limit) == 0:
            raise ValueError(
                f"trainer.{key}={limit} of {count} batches is less than one: write a larger fraction, or a number"
            )
    _check_validation_interval(config, limited(batches, getattr(trainer, train_key)))


def _check_validation_interval(config: Config, batches: int) -> None:
    trainer, interval = config.trainer, config.trainer.val_check_interval
    if type(interval) is not int:
        return
    if interval == 0:
        raise ValueError(
            "trainer.val_check_interval=0 is not allowed: to skip validation, set trainer.limit_val_batches=0"
        )
    if trainer.check_val_every_n_epoch is not None and interval > batches:
        raise ValueError(
            f"trainer.val_check_interval={interval} is more than the {batches} batches of an epoch: write a smaller "
            "number, a fraction such as 0.5, or trainer.check_val_every_n_epoch=null to count across epochs"
        )


def endless(config: Config) -> bool:
    """Whether the number of training steps is unknown in advance: neither epochs nor steps are limited."""
    trainer = config.trainer
    epochs = trainer.max_epochs if trainer.max_epochs is not None or trainer.max_time is None else -1
    return (epochs, trainer.max_steps) == (-1, -1) and not trainer.fast_dev_run


def check_callbacks(config: Config, callbacks: Sequence[Callback]) -> None:
    """Refuse Lightning callbacks that would change the frozen base or a run's settings, or have no effect."""
    for callback in callbacks:
        name = type(callback).__name__
        if reason := next((why for kind, why in UNFIT_CALLBACKS.items() if isinstance(callback, kind)), None):
            raise ValueError(f"callbacks: {name} {reason}")
        if isinstance(callback, StochasticWeightAveraging) and config.checkpoint.restore_best:
            raise ValueError(
                f"callbacks: {name}'s averaged weights would be lost when the best checkpoint is restored after "
                "training: add checkpoint.restore_best=false"
            )
        if (
            isinstance(callback, GradientAccumulationScheduler)
            and config.trainer.accumulate_grad_batches != 1
        ):
            raise ValueError(
                f"callbacks: {name} sets the number of batches per step: leave out trainer.accumulate_grad_batches"
            )


def check_strategy(config: Config, trainer: Trainer) -> None:
    """Refuse settings that do not work across several processes, or with a sharded base."""
    model, method, strategy = config.model, method_named(config.intervention.method), trainer.strategy
    if isinstance(strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
        raise ValueError(f"trainer.strategy: {type(strategy).__name__} {SHARDING}")
    if trainer.world_size > 1 and model.device_map is not None:
        raise ValueError(
            f"model.device_map={model.device_map} spreads one copy of the base over the devices of one process, but "
            f"there are {trainer.world_size}: write trainer.devices=1, or trainer=fsdp without device_map"
        )
    if not isinstance(strategy, ShardedBase):
        return
    reasons = {
        "model.device_map already places the weights": model.device_map is not None,
        "model.quantization leaves weights that cannot be sharded": bool(model.quantization),
        "model.compile has not been tested with a sharded base": model.compile,
        f"{method.name} trains the base's weights, but only frozen weights are sharded": method.trains_weights,
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        raise ValueError(f"trainer=fsdp: {reason}; leave it out, or write trainer=ddp")


def check_tied_head(config: Config, hf_config: PretrainedConfig, task: str, heads: Sequence[str]) -> None:
    """Refuse to train a language-model head that is tied to the embeddings but gets its own float32 copy."""
    widened = config.model.dtype != "float32" and config.model.float32_logits
    copied = widened and hf_config.tie_word_embeddings and task != "sequence_classification"
    if copied and (method_named(config.intervention.method).trains_weights or "lm_head" in heads):
        raise ValueError(
            f"{config.model.name} ties its head to its embeddings, but model.float32_logits gives the head a copy, so "
            "training would untie them. Set model.dtype=float32, or model.float32_logits=false"
        )
