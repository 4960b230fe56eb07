"""Merge interventions into the weights of their base model, if the weights can hold them; see :mod:`.folding`."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..adapters.first_values import fill
from ..adapters.reft.model import ReftModel
from ..base_models.heads import parameters_of
from .folding import Change, Fold, folds_of, weight_of


def merge(reft: ReftModel) -> PreTrainedModel:
    """Merge the interventions into the weights and return the base model, without hooks.

    Like peft's ``merge_and_unload``, this changes the base model in place, without a second copy in memory. The adapter
    is removed and ``reft`` cannot be used afterwards. Save it first, or merge a copy (``copy.deepcopy(reft)``).
    Trained heads stay trained. The model can be saved, loaded and used for generation like any other. Maps without a
    bias get one if the configuration has a switch for it (Llama's ``mlp_bias``).

    The changes are computed in float64 and rounded once to the dtype of the weights. In bfloat16 this rounding loses
    edits that are small compared to the weights: merge into a float32 model, then cast it.

    Args:
        reft: a model with positions ``all``, at linear maps or at modules that end in one (``mlp_output``,
            ``attention_output``).

    Raises:
        ValueError: if no weights compute the same, with the reason; the model is left as it was.
    """
    folds = folds_of(reft)
    model = reft.base_model
    _check_shared(model, folds)
    changes = [(fold, fold.change()) for fold in folds]
    moved = [fold.path for fold, change in changes if fold.linear.bias is None and change.bias.any()]
    switches, new = _biases_for(model, moved)
    heads = {name: p.detach().clone() for name, p in parameters_of(model, reft.config.heads).items()}
    reft.detach()
    fill(parameters_of(model, reft.config.heads), heads)
    for name in new:
        path = name.rpartition(".")[0]
        linear: Any = model.get_submodule(path)
        linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features), linear.weight.requires_grad)
    for name, value in switches.items():
        setattr(model.config.get_text_config(), name, value)
    for fold, change in changes:
        _put_into(fold.linear, change)
    return model


@torch.no_grad()
def _put_into(linear: nn.Linear | Conv1D, change: Change) -> None:
    merged = weight_of(linear) + change.weight
    linear.weight.copy_(merged.mT if isinstance(linear, Conv1D) else merged)
    if linear.bias is not None:
        linear.bias.copy_(linear.bias.to("cpu", torch.float64) + change.bias)


def _check_shared(model: PreTrainedModel, folds: Iterable[Fold]) -> None:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for fold in folds:
        if len(shared := names[id(fold.linear.weight)]) > 1:
            raise ValueError(
                f"layer {fold.site.layer} cannot become weights: {' and '.join(shared)} are the same weight"
            )


def _biases_for(model: PreTrainedModel, paths: list[str]) -> tuple[dict[str, bool], list[str]]:
    """Return the configuration settings that give linear maps a bias, and all biases that they add.

    Without such a setting, a reloaded model would lack its new biases.
    """
    if not paths:
        return {}, []
    old = set(model.state_dict())
    needed = {f"{path}.bias" for path in paths}
    switches: dict[str, bool] = {}
    new: list[str] = []
    off = [n for n, v in model.config.get_text_config().to_dict().items() if v is False and "bias" in n]
    for name in off:
        config = copy.deepcopy(model.config)
        setattr(config.get_text_config(), name, True)
        with torch.device("meta"):
            added = [key for key in type(model)(config).state_dict() if key not in old]
        if needed & set(added) and all(key.endswith(".bias") for key in added):
            switches[name] = True
            new += added
    if missing := sorted(needed - set(new)):
        raise ValueError(
            f"{type(model).__name__} has no bias at {missing[0].removesuffix('.bias')}, and its configuration cannot "
            "add one: the model would lose it when saved and loaded. Use to_lora() instead"
        )
    return switches, new
