"""Whatever `intervention.method` may name: interventions, a baseline, or both together."""

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
    """Attach interventions, or one of the baselines: whatever ``intervention.method`` may name.

    Args:
        base_model: a Hugging Face model; it is changed in place.
        method: what :func:`attach` takes, or a name of :data:`~reft_lightning.adapters.methods.METHODS`.
        beside: a peft method that is trained together with interventions.
        beside_options: its options.
        **settings: the arguments of :func:`attach`; ``heads``, as there, and the options of a baseline.

    Raises:
        ValueError: for anything unknown or out of range.
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
    """Return the part of an adapted model that edits representations; None where there is none."""
    return model if isinstance(model, ReftModel) and model.sites else None


def build_on_meta(
    config: PretrainedConfig, task: str = "causal_lm", attn_implementation: str | None = None
) -> PreTrainedModel:
    """Build the model of a configuration without memory for its weights.

    Args:
        config: of Hugging Face.
        task: of :data:`~reft_lightning.base_models.loading.TASKS`. An encoder has no causal form: it is built without a
            head then.
        attn_implementation: of transformers; None for its default.

    Raises:
        ValueError, ImportError: for an unknown task, or an attention that the model, or this machine, does not have.
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
    """Count what :func:`adapt` would train, from a configuration alone: no weights are needed.

    Takes the arguments of :func:`adapt`, and the task of :func:`build_on_meta`, and raises what attaching raises. It
    takes no random numbers from what is attached next.
    """
    with torch.random.fork_rng(devices=[]):
        return adapt(build_on_meta(config, task), method, **kwargs).parameter_count()
