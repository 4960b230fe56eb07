"""Attach any method that `intervention.method` can name: interventions, a baseline, or both together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from ..base_models.decoders import is_decoder
from ..base_models.heads import heads_to_train
from ..base_models.loading import TASKS
from ..interventions import Intervention
from ..suggest import check_choice
from .adapted import AdaptedModel, ParameterCount
from .attaching import all_or_nothing, check_base
from .baselines.in_place import InPlaceBaseline
from .baselines.joint import JointModel
from .baselines.peft import PeftBaseline
from .methods import METHODS, check_beside, method_named
from .reft.attach import attach
from .reft.config import config_of
from .reft.model import ReftModel


def adapt(
    base_model: PreTrainedModel,
    method: str | type[Intervention] = "loreft",
    *,
    beside: str | None = None,
    beside_options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> AdaptedModel:
    """Attach interventions or a baseline: any method that ``intervention.method`` can name.

    Args:
        base_model: a Hugging Face model; it is changed in place.
        method: as for :func:`attach`, or a name in :data:`~reft_lightning.adapters.methods.METHODS`.
        beside: a peft method to train together with interventions.
        beside_options: options of that method.
        **settings: for interventions, the arguments of :func:`attach`; for a baseline, ``heads`` and its options.

    Raises:
        ValueError: if an argument is unknown or out of range.
    """
    chosen = method_named(method)
    check_base(base_model)
    check_beside(chosen, beside, beside_options or {})
    if beside is None and not chosen.peft and chosen.in_place is None:
        return attach(base_model, method, **settings)
    heads = heads_to_train(base_model, settings.pop("heads", None if chosen.trains_heads else False))
    if beside is not None:
        with all_or_nothing(base_model):
            peft = PeftBaseline(base_model, METHODS[beside], heads, beside_options)
            return JointModel(peft, config_of(peft.base_model, method, heads=False, **settings))
    if chosen.peft:
        return PeftBaseline(base_model, chosen, heads, settings)
    chosen.check_options(settings)
    return InPlaceBaseline(base_model, chosen, heads)


def interventions_of(model: AdaptedModel) -> ReftModel | None:
    """Return the part of an adapted model that edits representations, or None."""
    return model if isinstance(model, ReftModel) and model.sites else None


def build_on_meta(
    config: PretrainedConfig, task: str = "causal_lm", attn_implementation: str | None = None
) -> PreTrainedModel:
    """Build a model from its configuration, without allocating memory for weights.

    Args:
        config: a Hugging Face configuration.
        task: one of :data:`~reft_lightning.base_models.loading.TASKS`. As an encoder has no causal form, ``causal_lm``
            builds it without a head.
        attn_implementation: as in transformers; None for its default.

    Raises:
        ValueError, ImportError: if the task is unknown, or the model or this machine does not support the attention.
    """
    check_choice("task", task, TASKS)
    kind = AutoModel if task == "causal_lm" and not is_decoder(config) else TASKS[task]
    with torch.device("meta"):
        return kind.from_config(config, attn_implementation=attn_implementation)


def count_parameters(
    config: PretrainedConfig,
    method: str | type[Intervention] = "loreft",
    *,
    task: str = "causal_lm",
    **kwargs: Any,
) -> ParameterCount:
    """Count the parameters that :func:`adapt` would train, from a configuration only: no weights are needed.

    Takes the arguments of :func:`adapt` and the task of :func:`build_on_meta`, and raises the errors of attaching. It
    leaves the state of the random number generators unchanged.
    """
    with torch.random.fork_rng(devices=[]):
        return adapt(build_on_meta(config, task), method, **kwargs).parameter_count()
