"""Build objects from a configuration; errors are reported before weights are loaded.

Checks run from cheap to expensive: the configuration, the interventions on a model without weights, the data, and
last the weights.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..adapters.adapt import adapt, build_on_meta
from ..adapters.adapted import AdaptedModel, ParameterCount
from ..adapters.methods import method_named
from ..adapters.saving import adapter_of, load_saved
from ..adapters.starting import first_state
from ..base_models.fingerprint import fingerprint_of
from ..base_models.heads import class_order
from ..base_models.loading import fit_to_tokenizer, load_base_model, load_tokenizer
from ..base_models.processors import load_processor
from ..config.schema import Config
from ..data import AnyFamily, Family
from ..data.benchmark_data import BenchmarkData
from ..data.prompts import tokenizer_of
from ..evaluation import Decoding
from ..speed.choose_part import ShortenedPass
from ..suggest import no_such_folder
from ..training.module import FinetuningModule
from ..training.objectives import Objective
from ..training.optimization import Optimization
from ..training.penalties import has_penalty
from .arguments import (
    PLACE,
    attachment,
    data_module,
    decoding_of,
    family_of,
    hf_config_of,
    method_of,
    model_commit,
    model_source,
    objective_of,
    optimization_of,
)
from .checks import (
    Monitor,
    check_monitor,
    check_reads_forward,
    check_tied_head,
    check_unused,
    endless,
    monitor_of,
    reported,
)
from .devices import check_accelerator
from .kinds import KINDS, Kind, is_text_to_text, kind_of

if TYPE_CHECKING:
    from .shared_base import Lane


@dataclass(frozen=True, kw_only=True)
class Outline:
    """Everything in a run except rows and weights."""

    family: AnyFamily
    source: dict[str, Any]  # arguments of load_base_model
    attached: dict[str, Any]  # arguments of adapt
    optimization: Optimization
    objective: Objective
    decoding: Decoding | None  # None for a classifier
    hf_config: PretrainedConfig
    tokenizer: Any
    processor: Any  # of images and text; the tokenizer if rows have no pictures
    count: ParameterCount  # of the published model, in which a tied head counts once, even if ours is a float32 copy
    monitor: Monitor
    class_order: list[int] | None  # see base_models.heads.class_order
    first_state: dict[str, Tensor] | None  # of the adapter that training starts from


@dataclass(frozen=True, kw_only=True)
class Prepared(Outline):
    """Everything in a run except the weights, fully checked."""

    data: BenchmarkData


@dataclass(frozen=True)
class Objects:
    """The objects built from a configuration."""

    prepared: Prepared
    model: AdaptedModel
    module: FinetuningModule
    name: str  # of the adapted model, as judges see it
    fingerprint: str | None = None  # of the base model's weights, unless they are random

    @property
    def data(self) -> BenchmarkData:
        """Return the data module."""
        return self.prepared.data

    def facts(self) -> dict[str, Any]:
        """Return their entries in ``results.json``."""
        count, decoding = self.prepared.count, self.prepared.decoding
        facts = {
            "data_versions": self.data.data_versions,
            "base_task": self.prepared.source["task"],
            "trainable_parameters": count.trainable,
            "base_parameters": count.base,
            "percent": count.percent,
            "head_parameters": sum(p.numel() for p in self.model.parameter_roles()["head"]),
            "commonest_answers": self.module.commonest,
        }
        known = {"model_commit": model_commit(self.prepared.source), "model_fingerprint": self.fingerprint}
        facts |= {name: value for name, value in known.items() if value}
        if decoding:  # stop strings belong to the task
            facts["decoding"] = {k: v for k, v in vars(decoding).items() if k != "stop_strings"}
        return facts


def check_jobs(configs: Mapping[str, Config]) -> None:
    """Check all that needs neither rows nor weights in the jobs of a sweep, keyed by the values it changes.

    Raises:
        ValueError: listing every job that cannot run, and why.
    """
    found, bad = {}, {}
    for what, config in configs.items():
        same = repr(replace(config, seed=0))
        if same not in found:
            found[same] = None
            try:
                check_accelerator(config.trainer.accelerator)
                outline(config)
            except (ValueError, OSError, ImportError) as error:
                found[same] = str(error)
        if found[same] is not None:
            bad[what] = found[same]
    if bad:
        told = (reason if reason.startswith(what) else f"{what}: {reason}" for what, reason in bad.items())
        listed = "\n".join(told)
        raise ValueError(f"nothing was started: {len(bad)} of {len(configs)} choices cannot run\n{listed}")


def outline(config: Config) -> Outline:
    """Check all of a configuration that needs neither rows nor weights, on a model without weights."""
    family = family_of(config)
    check_unused(config, family)
    monitor = monitor_of(config, family)
    source, optimization = model_source(config, family), optimization_of(config)
    objective = objective_of(config)
    attached = attachment(config, family)
    decoding = decoding_of(config, cast(Family, family)) if kind_of(family).generates else None
    hf_config = hf_config_of(source)
    source["revision"] = model_commit(source) or source["revision"]
    if is_text_to_text(kind_of(family), hf_config):
        family = replace(cast(Family, family), kind="text_to_text")
        source["task"] = kind_of(family).task
    order = class_order(hf_config, family.classes_of(config.data.tasks))
    check_reads_forward(config, hf_config, source["task"], family)
    processor = reader_of(kind_of(family), source, hf_config)
    tokenizer: Any = tokenizer_of(processor)
    if config.model.source == "random":
        fit_to_tokenizer(hf_config, tokenizer, config.model.config)
    on_meta = build_on_meta(hf_config, source["task"], source["attn_implementation"])
    adapted = adapt(on_meta, **attached)
    count = adapted.parameter_count()
    objective.check(adapted, method_named(config.intervention.method))
    optimization.check(adapted.parameter_roles(), math.inf if endless(config) else 100)
    check_tied_head(config, hf_config, source["task"], attached.get("heads") or ())
    if "PIDPenalty" in str(config.callbacks) and not has_penalty(adapted):
        raise ValueError(
            f"callbacks: PIDPenalty controls a parameter penalty, but {method_of(config)} has none: set "
            "intervention=brep (or red with intervention.options.restraint=1), or leave out the callback"
        )
    return Outline(
        family=family, source=source, attached=attached, optimization=optimization, objective=objective,
        decoding=decoding, hf_config=hf_config, tokenizer=tokenizer, processor=processor, count=count, monitor=monitor,
        class_order=order, first_state=_first_state(config, adapted),
    )  # fmt: skip


def _first_state(config: Config, adapted: AdaptedModel) -> dict[str, Tensor] | None:
    """Return the parameters that training starts from; None for the method's own initialisation."""
    if not (folder := config.intervention.init_from):
        return None
    if not any(adapted.parameter_roles().values()):
        raise ValueError(f"intervention.init_from={folder}: {method_of(config)} trains nothing; leave it out")
    if config.intervention.init != "paper":
        raise ValueError(
            f"intervention.init={config.intervention.init} and intervention.init_from={folder} both set the initial "
            "parameters: leave one of them out"
        )
    if not Path(folder).is_dir():
        raise ValueError(f"intervention.init_from={no_such_folder(Path(folder))}")
    try:
        return first_state(adapted, adapter_of(Path(folder)))
    except (ValueError, OSError) as error:
        raise ValueError(f"intervention.init_from={folder}: {error}") from error


def reader_of(kind: Kind, source: Mapping[str, Any], hf_config: PretrainedConfig) -> Any:
    """Return the reader of a kind's rows for a model: its tokenizer, or its processor of images and text."""
    place = {name: source[name] for name in (*PLACE, "tokenizer")}
    return load_processor(hf_config, **place) if kind.sees else load_tokenizer(**place)


def load_to_write(config: Config, kind: Kind) -> tuple[PreTrainedModel, Any, Kind]:
    """Load the base model of a configuration for chatting.

    Returns:
        The model, its tokenizer or processor, and the kind for generation, which can depend on the architecture.
    """
    source = model_source(config)
    hf_config = hf_config_of(source)
    kind = KINDS["text_to_text"] if is_text_to_text(kind, hf_config) else kind
    reader = reader_of(kind, source, hf_config)
    of_model = {"task": kind.task, "tokenizer": tokenizer_of(reader), "hf_config": hf_config}
    return load_base_model(**source | of_model)[0], reader, kind


def prepare(config: Config, run: Outline | None = None, trained_on: set[Hashable] | None = None) -> Prepared:
    """Check all of a configuration that needs no weights: its outline, unless given as ``run``, and the data.

    ``trained_on`` holds the questions the model was trained on, if the rows are not those of its own run.
    """
    run = run or outline(config)
    family, decoding = run.family, run.decoding
    data = data_module(config, family, run.processor)
    data.trained_on = trained_on
    data.prepare_data()
    data.setup("fit")
    if config.test and not config.sealed:
        data.setup("test")  # find unusable rows now, not after training
    if decoding is None:
        scores = family.measures_of(config.data.tasks)
    else:
        scores = reported(cast(Family, family), data.train_rows.examples[0], decoding)
    check_monitor(config, run.monitor.name, scores, data.val_tasks)
    return Prepared(data=data, **vars(run))


def build(config: Config, prepared: Prepared | None = None, lane: Lane | None = None) -> Objects:
    """Load the weights, unless the lane has them, attach the adapter, and create the Lightning module."""
    run = prepared or prepare(config)

    def load() -> PreTrainedModel:
        return load_base_model(**run.source | {"tokenizer": run.tokenizer, "hf_config": run.hf_config})[0]

    base_model = load() if lane is None else lane.base_model(load)
    fingerprint = None if config.model.source == "random" else fingerprint_of(base_model)
    if config.model.gradient_checkpointing:
        with warnings.catch_warnings():
            # the method's name in all of transformers 5; 5.23 deprecates it for 6
            warnings.filterwarnings("ignore", ".*gradient_checkpointing_enable.*deprecated", FutureWarning)
            base_model.gradient_checkpointing_enable()
    model = adapt(base_model, **run.attached)
    if run.first_state is not None:
        # heads that the saved adapter lacks keep their initial parameters
        state = model.adapter_state_dict() | run.first_state
        load_saved(model, adapter_of(Path(str(config.intervention.init_from))), state)
    model.config.base_model = config.model.name  # not a local folder, which exists on this machine only
    if config.model.compile:
        if config.model.gradient_checkpointing:
            # checkpointing's hook on the embeddings, and its warning, break the graph
            base_model.disable_input_require_grads()
            base_model.config.use_cache = False
        model.compile()
    training_pass: Any = _shortened_pass(config, run, model)
    if lane is not None:
        training_pass = lane.training_pass(model, run.data.train_rows, training_pass)
    module = kind_of(run.family).module(config, run, model, training_pass)
    module.train()  # Lightning trains in the mode it finds; the base's dropout is 0 unless base_dropout is set
    name = f"{config.model.name} {method_of(config)} seed {config.seed}"
    return Objects(run, model, module, name, fingerprint)


def _shortened_pass(config: Config, run: Prepared, model: AdaptedModel) -> ShortenedPass | None:
    """Return the pass that skips, in training, what no intervention can change; None if base dropout changes it."""
    if config.model.base_dropout or run.objective.pairs or config.data.source_prompt:
        return None
    limit = int(config.kept.limit_gb * 1e9)
    return ShortenedPass(model, run.data.train_rows, causal=run.decoding is not None, limit=limit)
