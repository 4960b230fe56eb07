"""From a configuration to objects: what is wrong is said before weights are loaded.

The order is the price of a mistake: the configuration, the interventions against a model without weights, the data,
and the weights last.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning import Trainer
from omegaconf import OmegaConf
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from .attachment import adapt, build_on_meta
from .base_models import load_base_model, load_config, load_tokenizer
from .baseline_methods import IN_PLACE, is_baseline
from .baselines import Baseline
from .callbacks import WandbReport, build_callbacks, build_loggers
from .classification import ClassificationModule
from .data import Family, get_family
from .data.base import Example
from .data.classification import ClassificationDataModule
from .data.custom import custom_family
from .data.labelled import ClassificationFamily, ClassificationTask
from .data.module import FamilyDataModule
from .data.options import option_batches
from .data.rows import DataSource
from .evaluation import Decoding
from .generation import GenerationModule
from .interventions import intervention_class, nearest, settings_of
from .model import ParameterCount, ReftModel
from .module import FinetuningModule
from .optimization import Optimization
from .schema import Config, DataConfig, DecodingConfig, InterventionConfig

AnyFamily = Family | ClassificationFamily

COLUMNS = ("prompt", "target", "answer", "context", "options", "messages")  # of one's own rows
PLACE = ("source", "name", "path", "package", "sha256", "revision")  # where a model lies


@dataclass
class Objects:
    """What a configuration builds."""

    model: ReftModel | Baseline
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
    hf_config = load_config(**{k: source[k] for k in (*PLACE, "base_dropout", "config", "num_labels")})
    if (
        source["task"] == "causal_lm"
        and type(hf_config) in MODEL_FOR_MASKED_LM_MAPPING
        and not hf_config.is_decoder
    ):
        raise ValueError(
            f"model {config.model.name} is an encoder, every token of which reads those behind it: it cannot learn to "
            f"say a target (family {family.name}). Choose a data=glue_... file, or a decoder."
        )
    adapt(
        build_on_meta(hf_config, source["task"]), **attached
    )  # raises what attaching would, without weights
    tokenizer = load_tokenizer(**{k: source[k] for k in (*PLACE, "tokenizer")})
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
    base_model, _ = load_base_model(**source)
    if config.model.gradient_checkpointing:
        with warnings.catch_warnings():
            # the name in all of transformers 5; 5.23 deprecates it for 6
            warnings.filterwarnings("ignore", ".*gradient_checkpointing_enable.*deprecated", FutureWarning)
            base_model.gradient_checkpointing_enable()
    model = adapt(base_model, **attached)
    model.config.base_model = config.model.name  # a folder of this machine means nothing elsewhere
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
    name = f"{config.model.name} {config.intervention.method} seed {config.seed}"
    return Objects(model, data, module, count, commonest, measures, name, _described(decoding))


def check_tied_head(config: Config, hf_config: Any, heads: Sequence[str]) -> None:
    """Refuse to train a language-model head that is the embeddings too, where it gets a float32 copy of its own.

    Raises:
        ValueError: with what to set.
    """
    copied = config.model.dtype != "float32" and config.model.float32_logits and hf_config.tie_word_embeddings
    if copied and (config.intervention.method == "full" or "lm_head" in heads):
        raise ValueError(
            f"{config.model.name} shares its embeddings with its head, and model.float32_logits gives the head a copy: "
            "training would part the two. Set model.dtype=float32, or model.float32_logits=false"
        )


def _described(decoding: Decoding | None) -> dict[str, Any]:
    values = {} if decoding is None else asdict(decoding)
    values.pop("stop_strings", None)  # they are the task's
    return values


def family_of(config: Config) -> AnyFamily:
    """Return the benchmark family; that of one's own data is made from the names of its columns."""
    data = config.data
    if data.family != "custom":
        return get_family(data.family)
    columns = {name: getattr(data, name) for name in COLUMNS}
    return custom_family(
        path=data.path, source=data.source, test_path=data.test_path, template=data.template, **columns
    )


def choose_monitor(config: Config) -> None:
    """Fill in which validation score decides: the family's main measure, or the loss where nothing is scored."""
    callbacks = config.callbacks
    if callbacks.monitor is None:
        callbacks.monitor = f"val/{(*measures_of(config, family_of(config)), 'loss')[0]}"
    if callbacks.mode is None:
        callbacks.mode = "min" if callbacks.monitor.endswith("loss") else "max"


def measures_of(config: Config, family: AnyFamily) -> tuple[str, ...]:
    """Return the names of a run's scores, the main one first; none where only the loss is measured."""
    if isinstance(family, ClassificationFamily):
        return classified(config, family).measures
    return family.measures if family.score else ()


def classified(config: Config, family: ClassificationFamily) -> ClassificationTask:
    """Return the one task of a classifier.

    Raises:
        ValueError: if there is not exactly one.
    """
    tasks = config.data.tasks
    if len(tasks) != 1:
        raise ValueError(
            f"a classifier has one task a run: give data.tasks one of {', '.join(family.tasks)}; got {list(tasks)}"
        )
    return family.task(tasks[0])


def decoding_of(config: Config, family: Family) -> Decoding:
    """Return how texts are generated."""
    values = OmegaConf.to_container(OmegaConf.structured(config.decoding))
    if values["max_new_tokens"] is None:
        values["max_new_tokens"] = family.max_new_tokens
    if values["verify"] is None:
        values["verify"] = family.literal
    return Decoding(**values, seed=config.seed)


def reported(family: Family, example: Example, decoding: Decoding) -> tuple[str, ...]:
    """Return the measures that a family's scorer gives for as many samples as are generated.

    Raises:
        ValueError: if it gives one that the family does not declare.
    """
    if family.score is None:
        return ()
    found = tuple(family.score([example.target] * decoding.samples, example).scores)
    for name in found:
        if name not in family.measures:
            raise ValueError(
                f"the scorer of {family.name} gives {name!r}, which its measures {family.measures} do not declare"
            )
    return (*found, *(["option_accuracy"] if example.options else []))


def check_unused(config: Config, family: AnyFamily) -> None:
    """Refuse settings that would change nothing.

    Raises:
        ValueError: naming the setting.
    """
    if isinstance(family, ClassificationFamily):
        for name, default in vars(DecodingConfig()).items():
            if getattr(config.decoding, name) != default:
                raise ValueError(
                    f"decoding.{name} means nothing to the classifiers of {family.name}: leave it out"
                )
    elif config.decoding.samples > 1 and family.score is None:
        raise ValueError(
            f"decoding.samples={config.decoding.samples}: nothing scores the texts of {family.name}, and a judge reads "
            "one text an instruction"
        )
    if config.optimizer.head_lr is not None and not attachment(config, family)["heads"]:
        raise ValueError(
            "optimizer.head_lr: no head is trained; leave it out, or name one in intervention.heads"
        )


def check_monitor(config: Config, measures: Sequence[str], tasks: Sequence[str]) -> None:
    """Refuse a monitored score that no validation will report.

    Raises:
        ValueError: for an unknown score, or early stopping without validation rows.
    """
    scores = [name for name in measures if name != "option_accuracy" or config.option_likelihood]
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
    """Return the commonest answer of each task's training rows, of rows that offer options."""
    answers: dict[str, Counter[str]] = {}
    for example in (example for example in examples if example.options):
        answers.setdefault(example.task, Counter())[example.answer] += 1
    return {task: counts.most_common(1)[0][0] for task, counts in answers.items()}


def model_source(config: Config, family: AnyFamily | None = None) -> dict[str, Any]:
    """Return the arguments of :func:`load_base_model`; the family says what kind of model it needs."""
    model = OmegaConf.to_container(OmegaConf.structured(config.model))
    del model["gradient_checkpointing"]
    kind: dict[str, Any] = {"task": "causal_lm", "num_labels": None}
    if isinstance(family, ClassificationFamily):
        kind = {
            "task": "sequence_classification",
            "num_labels": classified(config, family).num_labels,
        }
    return model | kind | {"seed": config.seed}


def attachment(config: Config, family: AnyFamily | None = None) -> dict[str, Any]:
    """Return the arguments of :func:`adapt`.

    A setting that the method's class does not take is left out where it stands at its default. A classifier's head
    is trained unless ``intervention.heads`` says otherwise.
    """
    values = OmegaConf.to_container(OmegaConf.structured(config.intervention))
    options, defaults = values.pop("options"), InterventionConfig()
    if values["heads"] is None:
        values["heads"] = "auto" if isinstance(family, ClassificationFamily) else ()
    if values["method"] == "none":  # the head alone
        return {"method": "none", "heads": values["heads"]}
    if is_baseline(values["method"]):
        return _baseline(config, values["heads"]) | options
    taken = settings_of(intervention_class(values["method"]))
    for name in ("rank", "dropout", "dropout_on", "init", "weight_dtype"):
        if values[name] is None or (name not in taken and values[name] == getattr(defaults, name)):
            del values[name]
    if isinstance(values["layers"], dict):
        values["layers"] = {int(layer): own or {} for layer, own in values["layers"].items()}
    return values | options


def _baseline(config: Config, heads: Any) -> dict[str, Any]:
    """Return the arguments of :func:`adapt` for a baseline; a frozen model's head is not trained.

    Raises:
        ValueError: for a setting of interventions, which would change nothing, or a prefix without a cache.
    """
    intervention, defaults = config.intervention, vars(InterventionConfig())
    method = intervention.method
    unused = [
        n
        for n in defaults
        if n not in ("method", "heads", "options") and getattr(intervention, n) != defaults[n]
    ]
    if unused:
        where = "" if method in IN_PLACE else ", whose own settings stand in intervention.options"
        said = " ".join(f"intervention.{name}={getattr(intervention, name)}" for name in unused)
        reset = " ".join(f"intervention.{name}={defaults[name]}" for name in unused)
        raise ValueError(
            f"{said} means nothing to {method}{where}: leave it out; where an experiment sets it, add {reset}"
        )
    if method == "peft/prefix_tuning" and config.model.gradient_checkpointing:
        raise ValueError(
            f"{method} holds its prefix in a cache, and gradient checkpointing has none: leave "
            "model.gradient_checkpointing out"
        )
    return {"method": method, "heads": () if method == "frozen" and intervention.heads is None else heads}


def data_module(
    config: Config, family: AnyFamily, tokenizer: Any
) -> FamilyDataModule | ClassificationDataModule:
    """Return the DataModule of a family.

    Raises:
        ValueError: for a setting that the family has no use for.
    """
    values = OmegaConf.to_container(OmegaConf.structured(config.data))
    source = DataSource(
        values.pop("source"), *(values.pop(k) for k in ("path", "package", "sha256", "mixture"))
    )
    values |= {"tasks": values["tasks"] or list(family.tasks), "seed": config.seed, "sealed": config.sealed}
    del values["family"]
    classifies = isinstance(family, ClassificationFamily)
    # the columns of one's own rows; and what has no meaning where a published validation set is divided
    unused = (*COLUMNS, "test_path")
    if classifies:
        unused += ("train_tasks", "validation_size", "template", "system_prompt")
    defaults = DataConfig()
    for name in unused:
        if family.name != "custom" and values[name] != getattr(defaults, name):
            raise ValueError(
                f"data.{name}={values[name]} means nothing to the family {family.name}: leave it out"
            )
        del values[name]
    return (ClassificationDataModule if classifies else FamilyDataModule)(family, tokenizer, source, **values)


def optimization_of(config: Config) -> Optimization:
    """Return the optimizer's settings."""
    o = config.optimizer
    return Optimization(
        lr=o.lr, weight_decay=o.weight_decay, betas=tuple(o.betas), eps=o.eps, schedule=o.schedule,
        warmup_ratio=o.warmup_ratio, head_lr=o.head_lr,
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
