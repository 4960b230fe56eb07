"""Attach interventions to a model.

For example, ``reft = attach(base_model, "loreft", rank=8, layers="all", positions="f7+l7")``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from ...interventions import Intervention
from .config import config_of
from .model import ReftModel
from .positions import MaskFunction


def attach(
    base_model: PreTrainedModel,
    method: str | type[Intervention] = "loreft",
    *,
    layers: str | Sequence[int] | Mapping[int, Mapping[str, Any]] = "all",
    positions: str | MaskFunction = "f7+l7",
    tied: str = "all",
    component: str = "block_output",
    clip: str = "paper",
    heads: str | Sequence[str] | bool | None = None,
    **settings: Any,
) -> ReftModel:
    """Freeze a model and attach interventions to it.

    Args:
        base_model: a Hugging Face decoder or encoder, or a model with both.
        method: a registered name (``loreft``, ``direft``, ...) or a subclass of Intervention; ``none`` attaches
            nothing, as a control that trains only heads, and ignores layers, positions and settings.
        layers: ``"all"``, a list of 0-based ids (which can be empty if heads are trained), or a dict from id to the
            settings that differ there (``{3: {"rank": 4}}``).
        positions: see :mod:`reft_lightning.adapters.reft.positions`.
        tied: ``all`` for one Phi per layer; ``group`` for one per term (prefix, suffix), which pyreft calls untied;
            ``position`` for one per position, the paper's untied formula.
        component: see :mod:`reft_lightning.adapters.reft.sites`.
        clip: how prompts that are too short for the positions are handled: ``paper``, or ``floor`` as in the authors'
            code.
        heads: paths of modules of the base model to train and save with the interventions. By default, those of a
            classifier, which start at random and would not be trained otherwise. ``False`` or ``[]`` trains none.
            See :mod:`reft_lightning.base_models.heads`.
        **settings: arguments of the intervention's constructor (``rank``, ``dropout``, ``init``, ...). A tensor is
            passed on as a list, the form it is saved in.

    Raises:
        ValueError: if an argument is unknown or out of range; the message says what is allowed.
    """
    config = config_of(
        base_model,
        method,
        layers=layers,
        positions=positions,
        tied=tied,
        component=component,
        clip=clip,
        heads=heads,
        **settings,
    )
    return ReftModel(base_model, config)
