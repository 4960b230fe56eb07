"""What ReFT is compared with: the names of the baselines, and the options that each takes.

``peft/NAME`` is a method of the peft library; the options are the arguments of its configuration class. ``bitfit``,
``full`` and ``frozen`` train the base model's own parameters, or none, and take no options.

Importing this file costs nothing: peft is imported when the options of one of its methods are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ...suggest import did_you_mean

PEFT = "peft/"
IN_PLACE = ("bitfit", "full", "frozen")

# peft's configuration class, and what makes the method of it.
PEFT_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {}),  # Hu et al. 2021, arXiv:2106.09685
    "rslora": ("LoraConfig", {"use_rslora": True}),  # Kalajdzievski 2023, arXiv:2312.03732
    "dora": ("LoraConfig", {"use_dora": True}),  # Liu et al. 2024, arXiv:2402.09353
    "ia3": ("IA3Config", {}),  # Liu et al. 2022, arXiv:2205.05638
    "prefix_tuning": ("PrefixTuningConfig", {}),  # Li and Liang 2021, arXiv:2101.00190
    "prompt_tuning": ("PromptTuningConfig", {}),  # Lester et al. 2021, arXiv:2104.08691
    "road": ("RoadConfig", {}),  # Liao and Monz 2024, arXiv:2409.00119
    "vera": ("VeraConfig", {}),  # Kopiczko et al. 2023, arXiv:2310.11454
    "oft": ("OFTConfig", {}),  # Qiu et al. 2023, arXiv:2306.07280
}

# Those that put virtual tokens in front of the text, and the others, which can be trained beside interventions.
VIRTUAL = (f"{PEFT}prefix_tuning", f"{PEFT}prompt_tuning")
JOINT_METHODS = tuple(name for name in (f"{PEFT}{short}" for short in PEFT_METHODS) if name not in VIRTUAL)

# Arguments of peft's classes that the framework sets, or that would break what it promises of an adapted model.
KEPT = {
    "task_type": "it is read from the model",
    "peft_type": "it is the method",
    "base_model_name_or_path": "it is model.name",
    "revision": "it is model.revision",
    "inference_mode": "adapters are trained here",
    "modules_to_save": "name trained heads in intervention.heads",
    "bias": "trained biases of the base would stay where the adapter is disabled; intervention=bitfit trains biases",
    "prefix_projection": "what peft saves of a projected prefix cannot be trained further, so no run could be resumed",
    "trainable_token_indices": "trained embeddings of the base are not supported",
    "auto_mapping": "peft fills it in",
    "peft_version": "peft fills it in",
}


# LoRA's class also takes the options of other methods, some of which change the base (PiSSA, OLoRA, LoftQ, layer
# replication) or are computed by calls that are not made here (aLoRA, EVA): another model would be trained or compared.
LORA_OPTIONS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "init_lora_weights",
)  # fmt: skip
LORA_STARTS = (True, False, "gaussian", "orthogonal")  # of init_lora_weights


def is_baseline(method: Any) -> bool:
    """Whether a method of the configuration is a baseline, whatever follows ``peft/``."""
    return isinstance(method, str) and (method.startswith(PEFT) or method in IN_PLACE)


def check_baseline(method: str, options: Mapping[str, Any]) -> None:
    """Refuse an unknown method or option.

    Raises:
        ValueError: with the nearest name and the allowed ones.
    """
    allowed = options_of(method)
    for name in options:
        if name in KEPT:
            raise ValueError(f"{method}: leave the option {name!r} out, {KEPT[name]}")
        if name == "init_lora_weights" and options[name] not in LORA_STARTS:
            raise ValueError(
                f"{method}: init_lora_weights must be one of {', '.join(map(str, LORA_STARTS))}; got "
                f"{options[name]!r}, which changes the weights of the base, or needs calls that are not made here"
            )
        if name not in allowed:
            takes = ", ".join(sorted(allowed)) or "none"
            raise ValueError(
                f"{method} takes no option {name!r}{did_you_mean(name, allowed)}\nit takes {takes}"
            )


def check_beside(method: Any, beside: str | None, options: Mapping[str, Any]) -> None:
    """Refuse what cannot be trained beside interventions.

    Args:
        method: of the interventions, ``intervention.method``.
        beside: of peft, or None for nothing.
        options: arguments of peft's configuration class.

    Raises:
        ValueError: for options without a method, a method beside a baseline or beside nothing, one with virtual
            tokens, or an unknown name or option, with the nearest.
    """
    if beside is None:
        if options:
            raise ValueError(
                f"beside_options {', '.join(options)} are those of a peft method, and none stands beside {method}: "
                "name it (intervention.beside=peft/lora), or leave them out"
            )
        return
    if method == "none":
        raise ValueError(
            f"beside={beside} stands beside interventions, and method none attaches none: to train {beside} alone, "
            f"take intervention.method={beside}"
        )
    if is_baseline(method):
        raise ValueError(
            f"beside={beside} stands beside interventions, and {method} is a baseline: take method=loreft or another "
            "intervention, or leave beside out"
        )
    if beside in VIRTUAL:
        raise ValueError(
            f"beside={beside}: its virtual tokens stand in front of the text, where the positions of interventions "
            f"such as f7 do not count them; take one of {', '.join(JOINT_METHODS)}"
        )
    if beside in IN_PLACE:
        raise ValueError(
            f"beside={beside} trains the base model's own weights, which an adapter does not hold; take one of "
            f"{', '.join(JOINT_METHODS)}"
        )
    if beside not in JOINT_METHODS:
        raise ValueError(
            f"beside must be one of {', '.join(JOINT_METHODS)}; got {beside!r}{did_you_mean(beside, JOINT_METHODS)}"
        )
    check_baseline(beside, options)


def options_of(method: str) -> list[str]:
    """Return the names of a baseline's options.

    Raises:
        ValueError: for an unknown method.
    """
    if method in IN_PLACE:
        return []
    name, fixed = _peft_method(method)
    known = [f.name for f in fields(_class(name)) if f.init and f.name not in {*KEPT, *fixed}]
    return [option for option in known if name != "LoraConfig" or option in LORA_OPTIONS]


def peft_config(method: str, options: Mapping[str, Any]) -> Any:
    """Return peft's configuration object of a method with some options.

    Raises:
        ValueError: for an unknown method or option, or what peft itself refuses.
    """
    check_baseline(method, options)
    name, fixed = _peft_method(method)
    try:
        return _class(name)(**options, **fixed)
    except TypeError as error:
        raise ValueError(f"{method}: {error}") from error


def _peft_method(method: str) -> tuple[str, dict[str, Any]]:
    known = [f"{PEFT}{name}" for name in PEFT_METHODS]
    if method not in known:
        names = [*known, *IN_PLACE]
        raise ValueError(
            f"unknown baseline {method!r}; known are {', '.join(names)}{did_you_mean(method, names)}"
        )
    return PEFT_METHODS[method.removeprefix(PEFT)]


def _class(name: str) -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the peft methods need the peft library ({error}): pip install 'reft_lightning[peft]'"
        ) from error
    return getattr(peft, name)
