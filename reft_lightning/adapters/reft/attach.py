"""Attach interventions to a model.

As in ``reft = attach(base_model, "loreft", rank=8, layers="all", positions="f7+l7")``.
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
        method: a name of the table (``loreft``, ``direft``, ...) or a subclass of Intervention; ``none`` attaches
            nothing, the control that trains only heads; layers, positions and settings are ignored.
        layers: ``"all"``, 0-based ids (with ``heads`` perhaps none), or a dict from id to what differs there
            (``{3: {"rank": 4}}``).
        positions: see :mod:`reft_lightning.adapters.reft.positions`.
        tied: ``all`` one Phi a layer; ``group`` one for each term (prefix, suffix), which pyreft calls untied;
            ``position`` one for each position, the paper's untied formula.
        component: see :mod:`reft_lightning.adapters.reft.sites`.
        clip: of prompts shorter than the positions ask for: ``paper``, or ``floor`` as in the authors' code.
        heads: paths of modules of the base model that are trained and saved with the interventions. Without it, those
            of a classifier are: nothing else trains them, and they start at random. ``False`` or ``[]`` trains none.
            See :mod:`reft_lightning.base_models.heads`.
        **settings: arguments of the intervention's constructor (``rank``, ``dropout``, ``init``, ...). A tensor arrives
            there as a list, as it is saved.

    Raises:
        ValueError: for anything unknown or out of range, with what is allowed.
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
