"""Attach interventions to a model, or count what that would train.

As in ``reft = attach(base_model, "loreft", rank=8, layers="all", positions="f7+l7")``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from .baseline_methods import IN_PLACE, check_baseline, check_beside, is_baseline
from .baselines import Baseline, InPlaceBaseline
from .checkpoint import ReftConfig
from .heads import heads_to_train
from .interventions import Intervention, intervention_class, method_name
from .joint import JointModel
from .model import ParameterCount, ReftModel
from .peft_baselines import PeftBaseline
from .positions import MaskFunction
from .sites import check_layers, text_config

NONE = "none"  # the method that attaches nothing: a classifier's head is trained alone


def attach(
    base_model: PreTrainedModel,
    method: str | type[Intervention] = "loreft",
    *,
    layers: str | Sequence[int] | dict[int, dict[str, Any]] = "all",
    positions: str | MaskFunction = "f7+l7",
    tied: str = "all",
    component: str = "block_output",
    clip: str = "paper",
    heads: str | Sequence[str] = (),
    **settings: Any,
) -> ReftModel:
    """Freeze a model and attach interventions to it.

    Args:
        base_model: a Hugging Face decoder or encoder.
        method: a name of the table (``loreft``, ``direft``, ...) or a subclass of Intervention; ``none`` attaches
            nothing, whatever is said of layers, positions and settings: the control that trains the heads alone.
        layers: ``"all"``, 0-based ids (with ``heads`` perhaps none), or a dict from id to what differs there
            (``{3: {"rank": 4}}``).
        positions: see :mod:`reft_lightning.positions`.
        tied: ``all`` one Phi a layer; ``group`` one for each term (prefix, suffix), which pyreft calls untied;
            ``position`` one for each position, the paper's untied formula.
        component: see :mod:`reft_lightning.sites`.
        clip: of prompts shorter than the positions ask for: ``paper``, or ``floor`` as in the authors' code.
        heads: paths of modules of the base model that are trained and saved with the interventions; ``auto`` for
            those of a classifier, see :mod:`reft_lightning.heads`.
        **settings: arguments of the intervention's constructor (``rank``, ``dropout``, ``init``, ...).

    Raises:
        ValueError: for anything unknown or out of range, with what is allowed.
    """
    trained_heads = heads_to_train(base_model, heads)
    base = base_model.config.name_or_path or None
    if method == NONE:
        if not trained_heads:
            raise ValueError(
                "method none trains heads alone, and none is named: give heads='auto' (intervention.heads=auto) for a "
                "classifier, as data=glue_... has one, or a list of module paths such as ['lm_head'] "
                "(intervention.heads=[lm_head])"
            )
        return ReftModel(base_model, ReftConfig(NONE, layers=[], heads=trained_heads, base_model=base))
    per_layer = {int(layer): dict(own) for layer, own in layers.items()} if isinstance(layers, dict) else {}
    for own in per_layer.values():
        if "method" in own:
            own["method"] = method_name(intervention_class(own["method"]))
    ids = check_layers(
        list(per_layer) if per_layer else layers,
        text_config(base_model.config).num_hidden_layers,
        none_allowed=bool(trained_heads),
    )
    config = ReftConfig(
        method=method_name(intervention_class(method)),
        layers=ids,
        positions=positions,
        tied=tied,
        component=component,
        clip=clip,
        settings=settings,
        per_layer=per_layer,
        heads=trained_heads,
        base_model=base,
    )
    return ReftModel(base_model, config)


def adapt(
    base_model: PreTrainedModel,
    method: str | type[Intervention] = "loreft",
    *,
    beside: str | None = None,
    beside_options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> ReftModel | Baseline | JointModel:
    """Attach interventions, or one of the baselines: whatever ``intervention.method`` may name.

    Args:
        base_model: a Hugging Face model; it is changed in place.
        method: what :func:`attach` takes, ``peft/lora`` and the like, ``bitfit``, ``full`` or ``frozen``.
        beside: a peft method that is trained together with interventions, one of ``joint.JOINT_METHODS``.
        beside_options: its options.
        **settings: the arguments of :func:`attach`; ``heads`` and the options of a baseline.

    Raises:
        ValueError: for anything unknown or out of range.
    """
    check_beside(method, beside, beside_options or {})
    if beside is not None:
        heads = heads_to_train(base_model, settings.pop("heads", ()))
        peft = PeftBaseline(base_model, beside, heads, beside_options)
        return JointModel(peft, partial(attach, method=method, **settings))
    if not is_baseline(method):
        return attach(base_model, method, **settings)
    heads = heads_to_train(base_model, settings.pop("heads", ()))
    if method in IN_PLACE:
        check_baseline(method, settings)
        return InPlaceBaseline(base_model, method, heads)
    return PeftBaseline(base_model, method, heads, settings)


def build_on_meta(config: PretrainedConfig, task: str = "causal_lm") -> PreTrainedModel:
    """Build the model of a configuration without memory for its weights.

    Args:
        config: of Hugging Face.
        task: ``causal_lm``, or ``sequence_classification`` for a model with its classifier. An encoder has no
            causal form: it is built without a head then.
    """
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    kind = AutoModelForCausalLM if causal else AutoModel
    if task == "sequence_classification":
        kind = AutoModelForSequenceClassification
    with torch.device("meta"):
        return kind.from_config(config)


def count_parameters(
    config: PretrainedConfig,
    method: str | type[Intervention] = "loreft",
    *,
    task: str = "causal_lm",
    **kwargs: Any,
) -> ParameterCount:
    """Count what :func:`adapt` would train, from a configuration alone: no weights are needed.

    Takes the arguments of :func:`adapt`, and the task of :func:`build_on_meta`, and raises what attaching raises.
    """
    return adapt(build_on_meta(config, task), method, **kwargs).parameter_count()
