"""Attach interventions to a model.

As in ``reft = attach(base_model, "loreft", rank=8, layers="all", positions="f7+l7")``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from ...base_models.heads import heads_to_train
from ...interventions import Intervention, intervention_class, method_name
from ..attaching import check_base
from ..plain import plain
from .config import ReftConfig, architecture_of
from .model import ReftModel
from .positions import MaskFunction
from .sites import check_layers, number_of_layers

NONE = "none"  # the method that attaches nothing: only a classifier's head is trained


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
        base_model: a Hugging Face decoder or encoder.
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
    check_base(base_model)
    trained_heads = heads_to_train(base_model, heads)
    number = number_of_layers(base_model)
    base, kind = base_model.config.name_or_path or None, architecture_of(base_model)
    if method == NONE:
        if not trained_heads:
            raise ValueError(
                "method none trains only heads, and none is named: give heads='auto' (intervention.heads=auto) for a "
                "classifier, as data=glue_... has one, or a list of module paths such as ['lm_head'] "
                "(intervention.heads=[lm_head])"
            )
        return ReftModel(
            base_model, ReftConfig(NONE, layers=[], heads=trained_heads, base_model=base, architecture=kind)
        )
    given = list(layers) if isinstance(layers, Mapping) else layers
    ids = check_layers(plain("layers", given), number, none_allowed=bool(trained_heads))
    per_layer: dict[int, dict[str, Any]] = {}
    for layer, (key, own) in zip(ids, layers.items(), strict=True) if isinstance(layers, Mapping) else ():
        if not isinstance(own, Mapping):
            raise ValueError(
                f"layers[{key}] must be a dict of what differs there, such as {{'rank': 4}}; got {own!r}"
            )
        per_layer[layer] = dict(own)
        if "method" in own:
            per_layer[layer]["method"] = method_name(intervention_class(own["method"]))
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
        architecture=kind,
    )
    return ReftModel(base_model, config)
