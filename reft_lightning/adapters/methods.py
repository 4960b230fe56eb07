"""The methods that ``intervention.method`` can name, and what code above the adapters needs to know about each.

===========================  =================================================================================
a name in ``INTERVENTIONS``  interventions; also the import path of a class
``none``                     only heads: the control for classifiers
``peft/NAME``                a method of the peft library; its options are arguments of its configuration class
``bitfit``, ``full``         some or all of the base model's own parameters
``frozen``                   nothing
===========================  =================================================================================

To add a baseline, add a record to :data:`METHODS` and a file to ``conf/intervention/``. Importing this file is cheap:
torch and peft are imported only when options are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any

from ..suggest import did_you_mean, needs_extra

# Arguments of peft's classes that are set here, or that would break a guarantee of adapted models.
RESERVED = {
    "task_type": "it is read from the model",
    "peft_type": "it is the method",
    "base_model_name_or_path": "it is model.name",
    "revision": "it is model.revision",
    "inference_mode": "adapters are trained here",
    "modules_to_save": "name trained heads in intervention.heads",
    "bias": "trained biases of the base would remain when the adapter is disabled; intervention=bitfit trains biases",
    "prefix_projection": "peft saves a projected prefix in a form that cannot be trained further or resumed",
    "trainable_token_indices": "trained embeddings of the base are not supported",
    "auto_mapping": "peft fills it in",
    "peft_version": "peft fills it in",
}

# LoRA's class also takes the options of other methods. Some change the base (PiSSA, OLoRA, LoftQ, layer replication)
# or need calls that are not made here (aLoRA, EVA): a different model would be trained or compared.
LORA_OPTIONS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "init_lora_weights",
)  # fmt: skip
LORA_STARTS = (True, False, "gaussian", "orthogonal")  # values of init_lora_weights


@dataclass(frozen=True)
class Method:
    """A method: what it trains, and which settings and options it takes."""

    name: str
    _: KW_ONLY
    takes_settings: bool = False  # positions, layers, rank and the other settings of interventions
    ignores_settings: bool = False  # ignores settings that it does not take, instead of refusing them
    trains: bool = True  # anything other than heads
    trains_heads: bool = True  # a classifier's head, unless the configuration names others
    trains_weights: bool = False  # the base model's own weight matrices, including embeddings and output head
    trains_all_layers: bool = False  # no part of the base model stays constant
    compiles: bool = False  # its training step can be compiled
    virtual_tokens: bool = False  # it puts trained tokens before the text
    needs_cache: bool = False  # its parameters enter the model as a key/value cache
    in_place: Callable[[str], bool] | None = None  # which of the base's own parameters it trains, by name
    peft: str = ""  # peft's configuration class
    peft_fixed: Mapping[str, Any] = field(default_factory=dict, hash=False)  # arguments that select it
    flat_vectors: bool = False  # parameters with one row or column count as vectors, without weight decay

    @property
    def joins(self) -> bool:
        """Whether it can be trained together with interventions."""
        return bool(self.peft) and not self.virtual_tokens

    @property
    def takes_source(self) -> bool:
        """Whether its edits take hidden states from other texts, which the rows must provide."""
        return self.takes_settings and bool(_intervention(self.name).takes_source)

    @property
    def closed_form(self) -> bool:
        """Whether its parameters are found in one step, by one objective and no other."""
        return self.takes_settings and _intervention(self.name).closed_form

    @property
    def takes_options(self) -> bool:
        """Whether ``intervention.options`` can hold anything."""
        return bool(self.peft) or self.takes_settings

    def options(self) -> list[str]:
        """Return the names of its options; imports the library that declares them."""
        if self.takes_settings:
            from ..interventions import settings_of

            return list(settings_of(_intervention(self.name)))
        if not self.peft:
            return []
        known = [f.name for f in fields(peft_class(self.peft)) if f.init]
        refused = {*RESERVED, *self.peft_fixed}
        return [n for n in known if n not in refused and (self.peft != "LoraConfig" or n in LORA_OPTIONS)]

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Reject an unknown option."""
        allowed = self.options()
        for name, value in options.items():
            if self.peft and name in RESERVED:
                raise ValueError(f"{self.name}: leave out the option {name!r}, {RESERVED[name]}")
            if self.peft and name == "init_lora_weights" and value not in LORA_STARTS:
                raise ValueError(
                    f"{self.name}: init_lora_weights must be one of {', '.join(map(str, LORA_STARTS))}; got {value!r}, "
                    "which changes the weights of the base, or needs calls that are not made here"
                )
            if name not in allowed:
                takes = ", ".join(sorted(allowed)) or "none"
                raise ValueError(
                    f"{self.name} takes no option {name!r}{did_you_mean(name, allowed)}\nit takes {takes}"
                )


def _peft(name: str, cls: str, fixed: Mapping[str, Any] | None = None, **more: Any) -> Method:
    return Method(f"peft/{name}", peft=cls, peft_fixed=fixed or {}, trains_all_layers=True, **more)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("none", trains=False, ignores_settings=True, compiles=True),
        _peft("lora", "LoraConfig"),  # Hu et al. 2021, arXiv:2106.09685
        _peft("rslora", "LoraConfig", {"use_rslora": True}),  # Kalajdzievski 2023, arXiv:2312.03732
        _peft("dora", "LoraConfig", {"use_dora": True}),  # Liu et al. 2024, arXiv:2402.09353
        _peft("ia3", "IA3Config", flat_vectors=True),  # Liu et al. 2022, arXiv:2205.05638; (d, 1) and (1, d)
        # Li and Liang 2021, arXiv:2101.00190
        _peft("prefix_tuning", "PrefixTuningConfig", virtual_tokens=True, needs_cache=True),
        # Lester et al. 2021, arXiv:2104.08691
        _peft("prompt_tuning", "PromptTuningConfig", virtual_tokens=True),
        _peft("road", "RoadConfig"),  # Liao and Monz 2024, arXiv:2409.00119
        _peft("vera", "VeraConfig"),  # Kopiczko et al. 2023, arXiv:2310.11454
        _peft("oft", "OFTConfig"),  # Qiu et al. 2023, arXiv:2306.07280
        # Ben Zaken et al. 2021, arXiv:2106.10199
        Method("bitfit", in_place=lambda name: name.endswith(".bias"), trains_all_layers=True),
        Method("full", in_place=lambda name: True, trains_weights=True, trains_all_layers=True),
        Method("frozen", in_place=lambda name: False, trains=False, trains_heads=False),
    )
}
"""Name -> method, for all methods except interventions, which have their own table."""


def method_named(name: Any) -> Method:
    """Return the method of a name; a name outside :data:`METHODS` and ``peft/...`` is taken as an intervention."""
    if not isinstance(name, str):
        name = getattr(name, "__name__", str(name))
    elif name in METHODS:
        return METHODS[name]
    elif name.startswith("peft/"):
        known = [known for known in METHODS if METHODS[known].peft]
        raise ValueError(
            f"unknown baseline {name!r}; known are {', '.join(known)}{did_you_mean(name, METHODS)}"
        )
    return Method(name, takes_settings=True, compiles=True)


def check_beside(method: Method, beside: str | None, options: Mapping[str, Any]) -> None:
    """Reject a method that cannot be trained together with interventions."""
    if beside is None:
        if options:
            raise ValueError(
                f"beside_options {', '.join(options)} belong to a peft method, but none is trained together with "
                f"{method.name}: name one (intervention.beside=peft/lora), or leave them out"
            )
        return
    joint = [name for name, other in METHODS.items() if other.joins]
    if method.ignores_settings:
        raise ValueError(
            f"beside={beside} is trained together with interventions, but method {method.name} attaches none: to train "
            f"only {beside}, use intervention.method={beside}"
        )
    if not method.takes_settings:
        raise ValueError(
            f"beside={beside} is trained together with interventions, but {method.name} is a baseline: use "
            "method=loreft or another intervention, or leave out beside"
        )
    if beside not in joint:
        other = METHODS.get(beside, Method(beside))
        reason = did_you_mean(beside, joint)
        if other.virtual_tokens:
            reason = (
                "; its virtual tokens precede the text, but positions of interventions, such as f7, skip them"
            )
        elif other.in_place is not None:
            reason = "; it trains the base model's own weights, which an adapter does not contain"
        raise ValueError(f"beside must be one of {', '.join(joint)}; got {beside!r}{reason}")


def _intervention(name: str) -> Any:
    from ..interventions import intervention_class

    try:
        return intervention_class(name)
    except ValueError as error:
        raise ValueError(f"{error}{did_you_mean(name, METHODS)}") from error


def peft_class(name: str) -> Any:
    """Return a configuration class of peft."""
    with needs_extra("peft", "the peft methods need the peft library"):
        import peft
    return getattr(peft, name)
