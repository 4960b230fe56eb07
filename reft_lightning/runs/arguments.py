"""From a section of the configuration to the arguments of what it configures.

A setting that would change nothing is refused here, where it stands beside what it is given to.
"""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from ..adapters.baselines.methods import check_beside, is_baseline
from ..config.method_settings import check_no_intervention_settings
from ..config.schema import Config, DataConfig, InterventionConfig
from ..data import AnyFamily, Family, get_family
from ..data.benchmark_data import BenchmarkData
from ..data.families.custom import custom_family
from ..data.rows import DataSource
from ..evaluation import Decoding
from ..interventions import intervention_class, settings_of
from ..suggest import import_object
from ..training.optimization import Optimization
from .kinds import kind_of

COLUMNS = ("prompt", "target", "answer", "context", "options", "messages")  # of one's own rows


def family_of(config: Config) -> AnyFamily:
    """Return the benchmark family; that of one's own data is made from the names of its columns."""
    data = config.data
    if data.family != "custom":
        return get_family(data.family)
    columns = {name: getattr(data, name) for name in COLUMNS}
    return custom_family(
        path=data.path, source=data.source, test_path=data.test_path, template=data.template, **columns
    )


def decoding_of(config: Config, family: Family) -> Decoding:
    """Return how texts are generated."""
    values = OmegaConf.to_container(OmegaConf.structured(config.decoding))
    if values["max_new_tokens"] is None:
        values["max_new_tokens"] = family.max_new_tokens
    if values["verify"] is None:
        values["verify"] = family.literal
    return Decoding(**values, seed=config.seed)


def model_source(config: Config, family: AnyFamily | None = None) -> dict[str, Any]:
    """Return the arguments of :func:`load_base_model`; the family says what kind of model it needs."""
    model = OmegaConf.to_container(OmegaConf.structured(config.model))
    del model["gradient_checkpointing"], model["compile"]
    num_labels = family.num_labels(config.data.tasks) if family else None
    return model | {"task": kind_of(family).task, "num_labels": num_labels, "seed": config.seed}


def attachment(config: Config, family: AnyFamily | None = None) -> dict[str, Any]:
    """Return the arguments of :func:`adapt`.

    A setting that the method's class does not take is left out where it stands at its default. A classifier's head
    is trained unless ``intervention.heads`` says otherwise.

    Raises:
        ValueError: for a setting that means nothing to a baseline, or a method that cannot be trained beside.
    """
    values = OmegaConf.to_container(OmegaConf.structured(config.intervention))
    options, defaults = values.pop("options"), InterventionConfig()
    beside, beside_options = values.pop("beside"), values.pop("beside_options")
    check_beside(values["method"], beside, beside_options)
    if values["heads"] is None:
        values["heads"] = kind_of(family).heads
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
    together = {"beside": beside, "beside_options": beside_options} if beside else {}
    return values | options | together


def method_of(config: Config) -> str:
    """Return the method as results name it: ``loreft``, or ``loreft + peft/lora`` where two are trained together."""
    intervention = config.intervention
    return " + ".join(filter(None, (intervention.method, intervention.beside)))


def _baseline(config: Config, heads: Any) -> dict[str, Any]:
    """Return the arguments of :func:`adapt` for a baseline; a frozen model's head is not trained.

    Raises:
        ValueError: for a setting of interventions, which would change nothing, or a prefix without a cache.
    """
    intervention, method = config.intervention, config.intervention.method
    check_no_intervention_settings(intervention)
    if method == "peft/prefix_tuning" and config.model.gradient_checkpointing:
        raise ValueError(
            f"{method} holds its prefix in a cache, and gradient checkpointing has none: leave "
            "model.gradient_checkpointing out"
        )
    return {"method": method, "heads": () if method == "frozen" and intervention.heads is None else heads}


def data_module(config: Config, family: AnyFamily, tokenizer: Any) -> BenchmarkData:
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
    kind, defaults = kind_of(family), DataConfig()
    for name in (*COLUMNS, "test_path", *kind.unused):  # the columns are those of one's own rows
        if family.name != "custom" and values[name] != getattr(defaults, name):
            raise ValueError(
                f"data.{name}={values[name]} means nothing to the family {family.name}: leave it out"
            )
        del values[name]
    return kind.data(family, tokenizer, source, **values)


def optimization_of(config: Config) -> Optimization:
    """Return optimizer and scheduler.

    Raises:
        ValueError: for an import path that names nothing, an argument that is not taken, or a value out of range.
    """
    optimizer, scheduler = config.optimizer, config.scheduler
    return Optimization(
        lr=optimizer.lr, weight_decay=optimizer.weight_decay, head_lr=optimizer.head_lr,
        warmup_ratio=scheduler.warmup_ratio,
        optimizer=_imported("optimizer._target_", optimizer._target_), optimizer_options=optimizer.options,
        scheduler=_imported("scheduler._target_", scheduler._target_), scheduler_options=scheduler.options,
    )  # fmt: skip


def _imported(key: str, path: str) -> Any:
    try:
        return import_object(path)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
