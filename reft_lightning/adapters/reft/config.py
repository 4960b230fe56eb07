"""The configuration of a ReFT adapter: all arguments it was attached with, as stored in a saved folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from ...base_models.heads import heads_to_train, is_classifier
from ...base_models.stacks import config_of_stack
from ...interventions import Intervention, intervention_class, method_name, settings_of
from ..attaching import check_base
from ..plain import plain
from .positions import MaskFunction, parse_positions
from .sites import check_layers, layers_with

NONE = "none"  # the method that attaches nothing: only a classifier's head is trained
FORMAT = 1
# types of the values in a file
KINDS = dict.fromkeys(("method", "positions", "tied", "component", "clip"), str) | {
    "layers": list,
    "heads": list,
    **dict.fromkeys(("settings", "per_layer", "architecture", "partitions"), dict),
    "beside": str,
    "scale": (int, float),
}
NEEDED = ("method", "layers", "positions")
WORDS = {str: "string", list: "list", dict: "set of keys and values", (int, float): "number"}
CONFIG_FILE, TENSOR_FILE, CARD_FILE = "reft_config.json", "reft.safetensors", "README.md"

WHERE = ("positions", "tied", "component", "clip")  # where to edit; everything else is a setting of the class
# two adapters that agree in these were attached in the same way
ATTACHED = ("method", "layers", "tied", "component", "clip", "heads", "per_layer", "partitions", "beside")
TRAINING = ("dropout", "dropout_on", "init")


class LayerSpec(NamedTuple):
    """The interventions attached at one layer."""

    method: str
    positions: str | MaskFunction
    tied: str
    component: str
    clip: str
    settings: dict[str, Any]


def architecture_of(model: PreTrainedModel) -> dict[str, Any]:
    """Return the architecture an adapter is trained for: model type, number of layers, width, and class."""
    config = config_of_stack(model)
    found = {"type": config.model_type, "layers": config.num_hidden_layers, "width": config.hidden_size}
    labels = {"labels": model.config.num_labels} if is_classifier(model) else {}
    return {**found, "class": type(model).__name__, **labels}


def check_architecture(model: PreTrainedModel, trained: dict[str, Any]) -> None:
    """Reject a model whose architecture differs from the one an adapter was trained on, except in class and head."""
    found = architecture_of(model)
    differing = [f"{name} {found.get(name)!r} instead of {value!r}" for name, value in trained.items()
                 if found.get(name) != value and name not in ("class", "labels")]  # fmt: skip
    if differing:
        raise ValueError(
            f"the adapter was trained on a different kind of model: {type(model).__name__} has {', '.join(differing)}. "
            "Load it onto its own base model, or pass strict=False"
        )


def _plain_positions(spec: Any) -> Any:
    return spec if callable(spec) else plain("positions", spec)


@dataclass
class ReftConfig:
    """Every argument of :func:`reft_lightning.attach`."""

    method: str
    layers: list[int]
    positions: str | MaskFunction = "f7+l7"
    tied: str = "all"
    component: str = "block_output"
    settings: dict[str, Any] = field(default_factory=dict)
    per_layer: dict[int, dict[str, Any]] = field(default_factory=dict)
    heads: list[str] = field(default_factory=list)
    base_model: str | None = None
    clip: str = "paper"
    scale: float = 1.0
    architecture: dict[str, Any] = field(default_factory=dict)  # the base model's; see architecture_of
    partitions: dict[str, list[int]] = field(default_factory=dict)  # name -> rows; see add_partition
    beside: str | None = None  # the peft method it was trained together with; see JointModel

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__.keys() - {"positions", "per_layer"}:
            setattr(self, name, plain(name, getattr(self, name)))
        self.positions = _plain_positions(self.positions)
        self.per_layer = {
            plain("layers", layer): {
                name: _plain_positions(value) if name == "positions" else plain(name, value)
                for name, value in own.items()
            }
            for layer, own in self.per_layer.items()
        }

    def for_layer(self, layer: int) -> LayerSpec:
        """Return the common settings, updated with those of this layer."""
        own = dict(self.per_layer.get(layer, {}))
        common = {name: own.pop(name, getattr(self, name)) for name in ("method", *WHERE)}
        return LayerSpec(**common, settings={**self.settings, **own})

    def differing(self, other: ReftConfig) -> list[str]:
        """Return the settings in which two adapters differ, except those that only affect training.

        A setting that was not given has the default of the intervention's class.
        """
        mine, theirs = (
            {
                "positions": str(parse_positions(config.positions)),
                **{name: getattr(config, name) for name in ATTACHED},
                **{name: value for name, value in config._all_settings().items() if name not in TRAINING},
            }
            for config in (self, other)
        )
        return [
            f"{name} {theirs.get(name)!r} instead of {mine.get(name)!r}"
            for name in {**mine, **theirs}
            if mine.get(name) != theirs.get(name)
        ]

    def _all_settings(self) -> dict[str, Any]:
        taken = {} if self.method == NONE else settings_of(intervention_class(self.method))
        defaults = {name: p.default for name, p in taken.items() if p.default is not p.empty}
        return {name: plain(name, value) for name, value in defaults.items()} | self.settings

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serialisable values; a position callable is named, not stored."""
        values = asdict(self)
        values["positions"] = str(parse_positions(self.positions))
        for layer, own in self.per_layer.items():
            if callable(own.get("positions")):
                raise ValueError(
                    f"layer {layer} has its own position function, and code is not stored: use one function for all "
                    "layers (and pass it again when loading), or a specification such as 'f7+l7'"
                )
        values["per_layer"] = {str(layer): own for layer, own in self.per_layer.items()}
        if self.beside is None:
            del values["beside"]
        return {"format": FORMAT, **values}

    @classmethod
    def from_dict(cls, values: dict[str, Any], positions: str | MaskFunction | None = None) -> ReftConfig:
        """Rebuild a configuration.

        Raises:
            ValueError: if the format is unknown, a key is unknown or missing or has the wrong type, or a needed
                position callable is not given.
        """
        values = dict(values)
        version = values.pop("format", None)
        if version != FORMAT:
            raise ValueError(
                f"{CONFIG_FILE} has format {version!r}, but this version of reft_lightning reads {FORMAT}: update it"
            )
        unknown = sorted(values.keys() - cls.__dataclass_fields__.keys())
        if unknown:
            raise ValueError(
                f"{CONFIG_FILE} has unknown keys {unknown}; known: {sorted(cls.__dataclass_fields__)}"
            )
        for name, kind in KINDS.items():
            if (name in values or name in NEEDED) and not isinstance(values.get(name), kind):
                held = f"{name}={values[name]!r}" if name in values else f"no {name}"
                raise ValueError(f"{CONFIG_FILE} has {held}; {name} must be a {WORDS[kind]}")
        for name, rows in values.get("partitions", {}).items():
            if not isinstance(rows, list) or not all(type(row) is int for row in rows):
                raise ValueError(
                    f"{CONFIG_FILE}: the partition {name!r} must be a list of rows; got {rows!r}"
                )
        for layer, own in values.get("per_layer", {}).items():
            if (
                not isinstance(own, dict)
                or not isinstance(own.get("method", ""), str)
                or not layer.isdecimal()
            ):
                raise ValueError(
                    f"{CONFIG_FILE}: per_layer must map layer numbers to settings; got {layer!r}: {own!r}"
                )
        if not math.isfinite(values.get("scale", 1.0)):
            raise ValueError(f"{CONFIG_FILE} has scale={values['scale']}; scale must be finite")
        if positions is not None:
            values["positions"] = positions
        elif values["positions"].startswith("<callable"):
            raise ValueError(
                f"the adapter was trained with the position function {values['positions']}, and code is not stored: "
                "pass it as ReftModel.from_pretrained(model, name, positions=function)"
            )
        values["per_layer"] = {int(layer): own for layer, own in values.get("per_layer", {}).items()}
        return cls(**values)


def config_of(
    base_model: PreTrainedModel,
    method: str | type[Intervention] = "loreft",
    *,
    layers: str | Sequence[int] | Mapping[int, Mapping[str, Any]] = "all",
    heads: str | Sequence[str] | bool | None = None,
    **settings: Any,
) -> ReftConfig:
    """Return the configuration for the arguments of :func:`attach`, with its defaults, checked against a model.

    Raises:
        ValueError: if an argument is unknown or out of range; the message says what is allowed.
    """
    check_base(base_model)
    trained_heads = heads_to_train(base_model, heads)
    number = layers_with(base_model, settings.get("component"))
    base, kind = base_model.config.name_or_path or None, architecture_of(base_model)
    if method == NONE:
        if not trained_heads:
            raise ValueError(
                "method none trains only heads, but none are given: use heads='auto' (intervention.heads=auto) for a "
                "classifier, as with data=glue_..., or a list of module paths such as ['lm_head'] "
                "(intervention.heads=[lm_head])"
            )
        return ReftConfig(NONE, layers=[], heads=trained_heads, base_model=base, architecture=kind)
    given = list(layers) if isinstance(layers, Mapping) else layers
    ids = check_layers(plain("layers", given), number, none_allowed=bool(trained_heads))
    per_layer: dict[int, dict[str, Any]] = {}
    for layer, (key, own) in zip(ids, layers.items(), strict=True) if isinstance(layers, Mapping) else ():
        if not isinstance(own, Mapping):
            raise ValueError(
                f"layers[{key}] must be a dict of the settings that differ there, such as {{'rank': 4}}; got {own!r}"
            )
        per_layer[layer] = dict(own)
        if "method" in own:
            per_layer[layer]["method"] = method_name(intervention_class(own["method"]))
    return ReftConfig(
        method=method_name(intervention_class(method)),
        layers=ids,
        **{name: settings.pop(name) for name in WHERE if name in settings},
        settings=settings,
        per_layer=per_layer,
        heads=trained_heads,
        base_model=base,
        architecture=kind,
    )
