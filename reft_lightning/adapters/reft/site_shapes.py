"""Check, on a copy of the model, that sites see one hidden state per token when interventions are attached.

Most blocks return the residual stream, (b, s, d). Some models keep several streams (Gemma 3n: four), read tokens of
their own before the text, compute their last layers only for tokens whose logits are needed (Gemma 4's shared layers),
or have modules that they never run. Positions are undefined there.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...base_models.bare import bare_copy
from ...base_models.stacks import config_of_stack, reads_two_texts
from .sites import Site, hook_at, width_at

log = logging.getLogger(__name__)

ROWS, COLUMNS = 2, 7
SHOWN = 6  # paths in a message

Place = tuple[str, str]  # path and end
Shapes = dict[Place, "tuple[int, ...] | None"]  # None: never computed

_known: dict[tuple[Any, ...], Shapes] = {}  # by class, device, configuration and places


def check_shapes(model: PreTrainedModel, sites: Iterable[Site]) -> None:
    """Run a copy of a model on a few tokens and check the shapes at its sites.

    A model that cannot be copied, or cannot run without weights, is checked in its first pass instead.
    """
    # a text does not reach visual sites
    asked = {(site.path, site.end): site for site in sites if not site.visual}
    key = (type(model), model.device.type, model.config.to_json_string(use_diff=False), frozenset(asked))
    if key not in _known:
        try:
            _known[key] = _shapes(model, asked) if asked else {}
        except Exception as error:
            log.debug(
                "the sites of %s are not checked before its first pass: %s", type(model).__name__, error
            )
            return
    seen = _known[key]
    silent = [asked[place].path for place, shape in seen.items() if shape is None]
    if silent and len(silent) == len(seen):
        raise ValueError(
            f"{type(model).__name__} reads text without calling {silent[0]}, so it cannot be edited there; it can be "
            f"edited at {_candidates(model, next(iter(asked.values()))) or 'no module'}"
        )
    if silent:
        log.warning(
            "texts without images do not run these modules, so they are not edited: %s", ", ".join(silent)
        )
    faults = {place: _fault(shape, asked[place].width) for place, shape in seen.items() if shape is not None}
    wrong = next((place for place, fault in faults.items() if fault), None)
    if wrong is not None:
        site, fine = asked[wrong], [asked[place].layer for place, fault in faults.items() if not fault]
        instead = [f"layers={fine}"] if fine else []
        instead += [found] if (found := _candidates(model, site)) else []
        raise ValueError(
            f"the {site.end} of {site.path} in {type(model).__name__} {faults[wrong]}. It can be edited at "
            f"{' or '.join(instead) or 'no module'}"
        )


def _fault(shape: tuple[int, ...], dim: int) -> str:
    if not shape:
        return "is not one tensor"
    if shape[:-1] not in ((ROWS, COLUMNS), (ROWS * COLUMNS,)):
        return (
            f"has the shape {shape} when the model reads {ROWS} rows of {COLUMNS} tokens, so it is not one hidden "
            "state per token"
        )
    if shape[-1] != dim:
        return (
            f"has width {shape[-1]}, expected {dim}; use the input of the linear layer that consumes it, as "
            "'...{layer}....input'"
        )
    return ""


def _shapes(model: PreTrainedModel, places: Iterable[Place]) -> Shapes:
    """Return the shape of the hidden states at each place in the copy; None if it never runs."""
    tried = bare_copy(model)
    modules = dict(tried.named_modules())
    seen: Shapes = {}
    for path, end in places:
        if path in modules:
            seen[path, end] = None
            hook_at(modules[path], end, partial(_note, seen, (path, end)))
    inputs: dict[str, Any] = {"input_ids": torch.full((ROWS, COLUMNS), 3, device=model.device)}
    # as in generation and training: Gemma 4's last layers then read only those tokens
    if "logits_to_keep" in inspect.signature(tried.forward).parameters:
        inputs["logits_to_keep"] = 1
    if reads_two_texts(model):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        tried(**inputs)
    return seen


def _note(seen: Shapes, place: Place, hidden: Any) -> None:
    seen[place] = tuple(hidden.shape) if isinstance(hidden, Tensor) else ()


def _candidates(model: PreTrainedModel, site: Site) -> str:
    """Return the paths in the block of a site whose outputs are one hidden state per token."""
    block = site.path.partition(f".{site.layer}")[0] + f".{site.layer}"
    inside = {name: module for name, module in model.named_modules() if name.startswith(f"{block}.")}
    width = config_of_stack(model, site.stack).hidden_size
    found = [
        path.replace(f".{site.layer}.", ".{layer}.", 1)
        for (path, end), shape in _shapes(model, [(name, "output") for name in inside]).items()
        if shape is not None and not _fault(shape, width_at(inside[path], end, width))
    ]
    return ", ".join(f"'{path}'" for path in sorted(found, key=len)[:SHOWN])
