"""The arguments of calls to a base model: which ones it knows, and where their rows are padded.

Shapes: b rows, s columns, d width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, get_args, is_typeddict

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import TransformersKwargs

from ..base_models.caches import cache_in, columns_in, with_new_name
from ..base_models.reading import position_ids_for
from ..base_models.stacks import reads_two_texts
from ..suggest import did_you_mean
from .masks import guess_attention

ROWS = (
    "input_ids", "inputs", "inputs_embeds", "attention_mask", "prompt_mask", "edit_mask", "image_mask", "position_ids",
)  # fmt: skip
# arguments of generate() that are padded independently
OTHER_TEXTS = ("negative_prompt_ids", "negative_prompt_attention_mask")
OF_LOSSES = ("num_items_in_batch", "ignore_index", "shift_labels")  # passed on to the loss
OF_OUTPUTS = ("return_dict", "output_attentions", "output_hidden_states")  # read before forward is called
OF_TOKENIZERS = ("token_type_ids",)  # returned by tokenizers, but not read by every model


def known_arguments(model: PreTrainedModel) -> frozenset[str] | None:
    """Return the keyword arguments that a model's forward can use; None if they cannot be known.

    Transformers models pass on arguments they do not name: to inner models, the attention, the loss.
    """
    known: set[str] = set()
    for cls in {type(module) for module in model.modules() if isinstance(module, PreTrainedModel)}:
        parameters = inspect.signature(cls.forward).parameters
        known |= parameters.keys()
        rest = [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]
        passed_on = [hint for p in rest for hint in get_args(p.annotation) if is_typeddict(hint)]
        if rest and not passed_on and not cls.__module__.startswith("transformers."):
            return None
        for hint in [*passed_on, *([TransformersKwargs] if rest else [])]:
            known |= hint.__required_keys__ | hint.__optional_keys__
    return frozenset({*known, *OF_OUTPUTS, *OF_TOKENIZERS, *(OF_LOSSES if "labels" in known else ())})


def check_rows(tokens: Any) -> None:
    """Reject tokens that are not a tensor of rows, such as a tokenizer's whole output, which pyreft takes."""
    if isinstance(tokens, Tensor) and tokens.ndim >= 2:
        return
    given = f"the shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else f"a {type(tokens).__name__}"
    hint = "; write ** before it, as in reft(**batch)" if isinstance(tokens, Mapping) else ""
    raise ValueError(f"tokens must be a tensor of rows and columns (b, s); got {given}{hint}")


def forward_inputs(
    model: PreTrainedModel,
    known: frozenset[str] | None,
    input_ids: Tensor | None,  # (b, s)
    attention_mask: Tensor | None,  # (b, s)
    labels: Tensor | None,
    others: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the arguments of a forward pass of the base model, with position ids if it needs them.

    ``known`` are its :func:`known_arguments`, ``others`` further arguments, such as ``inputs_embeds``.

    Raises:
        ValueError: if the model does not know an argument, suggesting the closest, or if there are no tokens.
    """
    others = with_new_name(others)
    for name in others:  # the model would pass on an unknown one without ever reading it
        if known is not None and name not in known:
            raise ValueError(
                f"{type(model).__name__} takes no argument {name!r}{did_you_mean(name, {*known, 'prompt_mask'})}"
            )
    tokens = input_ids if input_ids is not None else others.get("inputs_embeds")
    if tokens is None:
        raise ValueError("forward needs input_ids or inputs_embeds")
    check_rows(tokens)
    position_ids = others.get("position_ids")
    if position_ids is None:
        position_ids = position_ids_for(model, attention_mask, tokens.shape[1], others)
    own = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "labels": labels,
    }
    return {name: value for name, value in {**others, **own}.items() if value is not None or name not in own}


def left_padded_inputs(given: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """Return the arguments of ``generate`` with every row padded on the left, so that new tokens follow its text.

    All tensors of rows and columns are moved: ids, embeddings, masks, types, positions. They stay as they are for an
    encoder, as new tokens are the decoder's, and after a cache, whose columns are fixed.

    Raises:
        ValueError: if tokens are missing or given twice, a mask has the wrong shape, or there is padding between a
            cache and new tokens.
    """
    # other arguments keep None, which has a meaning for eos_token_id and others
    given = {
        name: value for name, value in with_new_name(given).items() if value is not None or name not in ROWS
    }
    if "inputs" in given:
        if "input_ids" in given:
            raise ValueError("the tokens are given twice, as input_ids and as inputs")
        given["input_ids"] = given.pop("inputs")
    tokens = given.get("inputs_embeds", given.get("input_ids"))
    if tokens is None:
        raise ValueError("generate needs input_ids (or inputs), or inputs_embeds")
    check_rows(tokens)
    shape = tokens.shape[:2]
    if "attention_mask" not in given:
        ids = "inputs_embeds" not in given
        given["attention_mask"] = (
            guess_attention(tokens, given, model.generation_config) if ids else tokens.new_ones(shape).long()
        )
    mask = given["attention_mask"]
    if mask.shape != shape:
        raise ValueError(
            f"attention_mask must have the shape of the tokens, {tuple(shape)}; got {tuple(mask.shape)}"
        )
    if reads_two_texts(model):
        return given
    if columns_in(cache_in(given)):
        if not mask[:, -1].all():
            raise ValueError(
                "with a cache, columns cannot be moved, and new tokens follow the last one, which is padding "
                "in some rows: pad the tokens after the cache on the left"
            )
        return given
    order = torch.argsort(mask.bool().long(), dim=-1, stable=True)  # (b, s)
    if torch.equal(order, torch.arange(shape[1], device=order.device).expand(shape)):
        return given

    def moved(name: str, value: Any) -> Any:
        if name in OTHER_TEXTS or not isinstance(value, Tensor):
            return value
        if name == "inputs_embeds":
            return value.gather(1, order[..., None].expand_as(value))
        if value.shape == shape or (name == "position_ids" and value.shape[-2:] == shape):
            return value.gather(-1, order.expand_as(value))
        return value

    return {name: moved(name, value) for name, value in given.items()}
