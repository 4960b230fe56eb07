"""Convert each section of the configuration to the arguments of the object that it configures.

A setting that would have no effect is refused here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any, NamedTuple

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PretrainedConfig

from ..adapters.methods import method_named
from ..adapters.reft.positions import parse_positions
from ..base_models.loading import load_config
from ..base_models.places import ModelPlace
from ..config.schema import (
    OF_TRAINING,
    Config,
    DataConfig,
    InterventionConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SchedulerConfig,
)
from ..data import AnyFamily, Family, get_family
from ..data.benchmark_data import BenchmarkData
from ..data.families import vision
from ..data.families.custom import custom_family, default_template
from ..data.marks import as_marks
from ..data.preferences import as_preferences
from ..data.rows import DataSource
from ..evaluation import Decoding
from ..interventions import intervention_class, settings_of
from ..suggest import import_object, trusted
from ..training.objectives import Objective
from ..training.optimization import Optimization, check_options
from .kinds import kind_of

# modules of schedule functions that are safe to call
SCHEDULES = ("reft_lightning.training.schedules", "transformers.optimization")
OF_CONFIG = ("base_dropout", "config", "num_labels", "quantization", "device_map")  # arguments of load_config
PLACE = tuple(field.name for field in fields(ModelPlace))


class OwnRows(NamedTuple):
    """A family for the user's own rows, defined by column names.

    Args:
        make: path, source, template and the settings -> the family.
        settings: keys of ``data`` that it takes.
        kind: kind of the family.
        template: template used if ``data.template`` is not set.
        line_break: whether a plain question ends with a line break.
    """

    make: Callable[..., AnyFamily]
    settings: tuple[str, ...]
    kind: str
    template: Callable[[DataConfig], str]
    line_break: Callable[[DataConfig], bool]


FILES = ("validation_path", "test_path")
OWN = {
    "custom": OwnRows(
        custom_family,
        ("prompt", "target", "answer", "context", "options", "answer_form", "messages", "source_prompt", "delimiter",
         "marks", *FILES),
        "generation",
        template=lambda data: default_template(data.messages),
        line_break=lambda data: bool(data.prompt or data.messages),
    ),
    "vision": OwnRows(
        vision.vision_family,
        ("prompt", "target", "messages", "image", "image_folder", *FILES),
        "vision",
        template=lambda data: vision.TEMPLATE,
        line_break=lambda data: False,
    ),
}  # fmt: skip
OF_OWN = tuple(dict.fromkeys(name for own in OWN.values() for name in own.settings))


def family_of(config: Config) -> AnyFamily:
    """Return the benchmark family; for a reward model, as preferences.

    A family for the user's own data is built from its column names.
    """
    data = config.data
    if (own := OWN.get(data.family)) is None:
        family = get_family(data.family)
    else:
        settings = {name: getattr(data, name) for name in own.settings}
        family = own.make(path=data.path, source=data.source, template=data.template, **settings)
    return as_preferences(family) if objective_of(config).rewards else family


def decoding_of(config: Config, family: Family) -> Decoding:
    """Return how texts are generated."""
    values = asdict(config.decoding)
    if values["max_new_tokens"] is None:
        values["max_new_tokens"] = family.max_new_tokens
    if values["verify"] is None:
        values["verify"] = family.literal
    return Decoding(**values, seed=config.seed)


def reads_preferences(config: Config) -> bool:
    """Whether a run trained a reward model with a built-in objective; custom objectives are not imported for this."""
    return config.objective._target_.startswith("reft_lightning.") and objective_of(config).rewards


def untrained(config: Config) -> Config:
    """Return a configuration without its training settings, so that nothing they name is imported or read."""
    objective = config.objective if reads_preferences(config) else ObjectiveConfig()
    intervention = replace(config.intervention, init_from=None)
    return replace(
        config,
        optimizer=OptimizerConfig(),
        scheduler=SchedulerConfig(),
        objective=objective,
        intervention=intervention,
    )


def model_source(config: Config, family: AnyFamily | None = None) -> dict[str, Any]:
    """Return the arguments of :func:`load_base_model`; the family determines the kind of model."""
    model = asdict(config.model)
    for key in OF_TRAINING:
        del model[key]
    num_labels = family.num_labels(config.data.tasks) if family else None
    return model | {"task": kind_of(family).task, "num_labels": num_labels, "seed": config.seed}


def hf_config_of(source: dict[str, Any]) -> PretrainedConfig:
    """Return the Hugging Face configuration of the model that :func:`model_source` describes."""
    return load_config(**{name: source[name] for name in (*PLACE, *OF_CONFIG)})


def model_commit(source: Mapping[str, Any]) -> str | None:
    """Return the commit of a hub model whose configuration has been read; None for any other model."""
    return ModelPlace(**{name: source[name] for name in PLACE}).commit()


def attachment(config: Config, family: AnyFamily | None = None) -> dict[str, Any]:
    """Return the arguments of :func:`adapt`.

    A setting that the method does not take is left out if it has its default. A classifier's head is trained unless
    ``intervention.heads`` says otherwise.
    """
    values = asdict(config.intervention)
    del values["init_from"]  # used by training only
    method, options, defaults = method_named(values["method"]), values.pop("options"), InterventionConfig()
    if values["heads"] is None:
        values["heads"] = kind_of(family).heads if method.trains_heads else ()
    taken = {"method", "heads"}
    if method.takes_settings:
        taken |= {"layers", "positions", "tied", "component", "clip"}
        taken |= settings_of(intervention_class(method.name)).keys()
    if isinstance(values["layers"], dict):
        values["layers"] = {int(layer): own or {} for layer, own in values["layers"].items()}

    def passes(name: str) -> bool:
        changed = values[name] != getattr(defaults, name) and not method.ignores_settings
        return values[name] is not None and (name in taken or changed)

    return {name: value for name, value in values.items() if passes(name)} | options


def method_of(config: Config) -> str:
    """Return the method's name in results: ``loreft``, or ``loreft + peft/lora`` if two are trained together."""
    intervention = config.intervention
    return " + ".join(filter(None, (intervention.method, intervention.beside)))


def positions_of(intervention: InterventionConfig) -> list[str]:
    """Return the common positions, then those of layers that set their own."""
    layers = intervention.layers.values() if isinstance(intervention.layers, Mapping) else ()
    own = [layer["positions"] for layer in layers if isinstance(layer, Mapping) and "positions" in layer]
    return [intervention.positions, *own]


def needs_marks(intervention: InterventionConfig) -> bool:
    """Whether each row must say which tokens are edited."""
    return any(parse_positions(spec).needs_mask for spec in positions_of(intervention))


def data_module(config: Config, family: AnyFamily, tokenizer: Any) -> BenchmarkData:
    """Return the DataModule of a family; if rows have pictures, the tokenizer is a processor."""
    values = asdict(config.data)
    source = DataSource(
        values.pop("source"), *(values.pop(k) for k in ("path", "package", "sha256", "mixture"))
    )
    values |= {"tasks": values["tasks"] or list(family.tasks), "seed": config.seed, "sealed": config.sealed}
    if objective_of(config).pairs:
        values["pairs"] = True
    if config.data.source_prompt:
        values["sources"] = True
    del values["family"]
    kind, defaults = kind_of(family), DataConfig()
    taken = OWN[config.data.family].settings if config.data.family in OWN else ()
    for name in (*OF_OWN, *kind.unused):
        if name not in taken and values[name] != getattr(defaults, name):
            raise ValueError(
                f"data.{name}={values[name]} does not apply to the family {family.name}: leave it out"
            )
        del values[name]
    if config.data.marks:
        values |= {"marks": as_marks(config.data.marks), "given": needs_marks(config.intervention)}
    return kind.data(family, tokenizer, source, **values)


def optimization_of(config: Config) -> Optimization:
    """Return the optimizer and the scheduler."""
    optimizer, scheduler = config.optimizer, config.scheduler
    targets = (
        imported("optimizer._target_", optimizer._target_),
        imported("scheduler._target_", scheduler._target_),
    )
    if not trusted():
        _check_trains(*targets)
    return Optimization(
        lr=optimizer.lr, weight_decay=optimizer.weight_decay, head_lr=optimizer.head_lr,
        warmup_ratio=scheduler.warmup_ratio,
        optimizer=targets[0], optimizer_options=optimizer.options,
        scheduler=targets[1], scheduler_options=scheduler.options,
        loss_reduction=config.loss_reduction,
    )  # fmt: skip


def objective_of(config: Config) -> Objective:
    """Return the objective that training minimises."""
    target = imported("objective._target_", config.objective._target_)
    if not (inspect.isclass(target) and issubclass(target, Objective)):
        raise ValueError(
            f"objective._target_: {config.objective._target_} is not a subclass of "
            "reft_lightning.training.objectives.Objective"
        )
    check_options("objective", target, config.objective.options)
    return target(**config.objective.options)


def _check_trains(optimizer: Any, scheduler: Any) -> None:
    """Refuse import paths from an untrusted folder that are not an optimizer or a scheduler."""
    schedules = getattr(scheduler, "__module__", "") in SCHEDULES
    for key, value, fits in (
        ("optimizer", optimizer, inspect.isclass(optimizer) and issubclass(optimizer, Optimizer)),
        ("scheduler", scheduler, schedules or (inspect.isclass(scheduler) and issubclass(scheduler, LRScheduler))),
    ):  # fmt: skip
        if not fits:
            raise ValueError(
                f"{key}._target_: {value!r} is not a known {key}, and calling it could run any code; if you trust its "
                "author, add trust_code=true"
            )


def imported(key: str, path: str) -> Any:
    """Return the object at an import path; a ``ValueError`` for an invalid one names the key."""
    try:
        return import_object(path)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
