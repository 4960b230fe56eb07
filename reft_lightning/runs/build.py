"""From a configuration to objects: what is wrong is said before weights are loaded.

The order is the price of a mistake: the configuration, the interventions against a model without weights, the data,
and the weights last.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from ..adapters.adapt import adapt, build_on_meta
from ..adapters.adapted import ParameterCount
from ..adapters.baselines.in_place import Baseline
from ..adapters.baselines.joint import JointModel
from ..adapters.reft.model import ReftModel
from ..base_models.loading import load_base_model, load_config, load_tokenizer
from ..base_models.places import ModelPlace
from ..config.schema import Config
from ..data.example import Example
from ..data.generation_data import FamilyDataModule
from ..data.labelled import ClassificationFamily
from ..data.option_batches import option_batches
from ..evaluation import Decoding
from ..speed.choose_part import training_pass
from ..speed.lean_pass import lean_pass
from ..training.classification import ClassificationModule
from ..training.generation import GenerationModule
from ..training.module import FinetuningModule
from .arguments import (
    attachment,
    data_module,
    decoding_of,
    family_of,
    method_of,
    model_source,
    optimization_of,
)
from .checks import (
    check_monitor,
    check_reads_forward,
    check_tied_head,
    check_unused,
    choose_monitor,
    measures_of,
    reported,
)

PLACE = tuple(field.name for field in fields(ModelPlace))


@dataclass
class Objects:
    """What a configuration builds."""

    model: ReftModel | Baseline | JointModel
    data: FamilyDataModule
    module: FinetuningModule
    count: ParameterCount
    commonest: dict[str, str]  # task -> the commonest answer of its training rows
    measures: tuple[str, ...]  # names of the scores, the main one first; none where only the loss is measured
    name: str  # of the adapted model, as judges know it
    decoding: dict[str, Any]  # how texts are generated; empty for a classifier

    @property
    def head_parameters(self) -> int:
        """Count the trained parameters of heads, which the paper leaves out of its counts."""
        return sum(p.numel() for p in self.model.parameter_roles()["head"])


def build(config: Config) -> Objects:
    """Build what a run needs, the weights last.

    Raises:
        ValueError: for an unknown family, task, model, layer, rank, position or setting, or missing data.
    """
    family = family_of(config)
    choose_monitor(config)
    check_unused(config, family)
    source = model_source(config, family)
    optimization = optimization_of(config)
    attached = attachment(config, family)
    decoding = None if isinstance(family, ClassificationFamily) else decoding_of(config, family)
    place = {name: source[name] for name in PLACE}
    hf_config = load_config(**place, **{k: source[k] for k in ("base_dropout", "config", "num_labels")})
    check_reads_forward(config, hf_config, source["task"], family)
    # raises what attaching would, without weights
    adapt(build_on_meta(hf_config, source["task"]), **attached)
    tokenizer = load_tokenizer(**place, tokenizer=source["tokenizer"])
    data = data_module(config, family, tokenizer)
    data.prepare_data()
    data.setup("fit")
    if config.test and not config.sealed:
        data.check_test()
    measures = measures_of(config, family)
    if decoding is not None:
        check_monitor(config, reported(family, data.train_rows.examples[0], decoding), data.val_tasks)
    else:
        check_monitor(config, measures, data.val_tasks)
    check_tied_head(config, hf_config, attached.get("heads") or ())
    base_model, _ = load_base_model(**source | {"tokenizer": tokenizer, "hf_config": hf_config})
    if config.model.gradient_checkpointing:
        with warnings.catch_warnings():
            # the name in all of transformers 5; 5.23 deprecates it for 6
            warnings.filterwarnings("ignore", ".*gradient_checkpointing_enable.*deprecated", FutureWarning)
            base_model.gradient_checkpointing_enable()
    model = adapt(base_model, **attached)
    model.config.base_model = config.model.name  # a folder of this machine means nothing elsewhere
    if config.model.compile:
        if config.model.gradient_checkpointing:
            # its hook on the embeddings, and its warning, break the graph
            base_model.disable_input_require_grads()
            base_model.config.use_cache = False
        model.compile()
    if decoding is None:
        module: FinetuningModule = ClassificationModule(model, tokenizer, data, optimization)
        commonest = module.commonest
    else:
        commonest = commonest_answers(data.train_rows.examples)
        options = partial(option_batches, tokenizer, max_length=data.max_length)
        module = GenerationModule(
            model, tokenizer, family, data.val_tasks, data.test_tasks, optimization, decoding,
            options if config.option_likelihood else None, commonest,
        )  # fmt: skip
    module.train()  # Lightning starts training in the mode it finds; the base's dropout is 0 unless asked for
    # of the published model: a head in float32 has a copy of embeddings that it shares there
    count = adapt(build_on_meta(base_model.config, source["task"]), **attached).parameter_count()
    name = f"{config.model.name} {method_of(config)} seed {config.seed}"
    return Objects(model, data, module, count, commonest, measures, name, _described(decoding))


def _described(decoding: Decoding | None) -> dict[str, Any]:
    values = {} if decoding is None else asdict(decoding)
    values.pop("stop_strings", None)  # they are the task's
    return values


def commonest_answers(examples: Iterable[Example]) -> dict[str, str]:
    """Return the commonest answer of each task's training rows, of rows that offer options."""
    answers: dict[str, Counter[str]] = {}
    for example in (example for example in examples if example.options):
        answers.setdefault(example.task, Counter())[example.answer] += 1
    return {task: counts.most_common(1)[0][0] for task, counts in answers.items()}


def shorten_training_pass(config: Config, objects: Objects) -> None:
    """Let training leave out what no intervention can change or nothing reads; keep it where the configuration says so.

    The base's own dropout makes nothing constant: then training is plain. The pass is made when training starts, where
    the model has its device and precision.
    """
    if not config.model.base_dropout:
        objects.module.make_training_pass = partial(
            _short_pass, objects.model, objects.data.train_rows, bool(objects.decoding), config.model.compile,
            limit=int(config.kept.limit_gb * 1e9), precision=config.trainer.precision,
            folder=Path(config.kept.folder) if config.kept.folder else None,
        )  # fmt: skip


def _short_pass(
    model: Any, rows: Any, causal: bool, compiled: bool, **kept: Any
) -> Callable[..., Any] | None:
    run = training_pass(model, rows, causal=causal, compiled=compiled, **kept)
    return run if compiled else lean_pass(model, run, last_logits=causal)
