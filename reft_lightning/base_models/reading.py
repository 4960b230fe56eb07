"""How a base model reads a row of tokens, found by running it on a few tokens once per model.

Neither the class name nor the configuration tells: a decoder can be made bidirectional
(``use_bidirectional_attention``), and a model can derive positions from ids, masks or images.

Shapes: b rows, s columns.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from .bare import bare_copy
from .decoders import is_decoder
from .heads import is_classifier
from .patching import replaced
from .stacks import reads_two_texts
from .vision import image_tokens

log = logging.getLogger(__name__)

NOISE = 0.05  # largest effect of rounding on unchanged logits, relative to the effect of an earlier token
# tensors of more than one dimension that can come with a text; any other is for images or audio
OF_TEXT = ("inputs_embeds", "token_type_ids", "langs", "shift_labels", "encoder_hidden_states")
FOLLOWS = "token_type_ids"  # 1 for tokens after the prompt, in models that read prompts bidirectionally
CONTEXT = 4096  # tokens of prompt and answer, if a model states no limit
# largest difference, relative to the largest logit, of one text under different padding in 16 bits
CLOSE = 0.05


class Reading(NamedTuple):
    """How a base model reads a row."""

    causal: bool  # whether it has columns of logits, none of which depends on a later token
    needs_position_ids: bool  # whether only with them it reads a left-padded row as it would without padding


_found: WeakKeyDictionary[PreTrainedModel, Reading] = WeakKeyDictionary()


def reading_of(model: PreTrainedModel) -> Reading:
    """Return how a base model reads, from a few passes over a few tokens at the first call."""
    if model not in _found:
        _found[model] = _find_out(model)
    return _found[model]


def _find_out(model: PreTrainedModel) -> Reading:
    # an encoder is bidirectional, and neither it nor its decoder takes position ids
    if reads_two_texts(model):
        return Reading(causal=False, needs_position_ids=False)
    try:
        return _try(bare_copy(model))
    except Exception as error:
        log.debug("%s cannot be copied, so it is tested itself: %s", type(model).__name__, error)
    try:
        with evaluating(model):
            return _try(model)
    except Exception as error:
        assumed = Reading(is_decoder(model.config), takes(model, "position_ids"))
        log.warning(
            "how %s reads a row could not be tested (%s): assuming it is %s",
            type(model).__name__, error, "a decoder" if assumed.causal else "an encoder",
        )  # fmt: skip
        return assumed


def _try(model: PreTrainedModel) -> Reading:
    *tokens, other = _ordinary_tokens(model, 7)
    rows = torch.tensor([tokens, [*tokens[:-1], other], [other, *tokens[1:]]])
    logits, follows = _read(model, rows, torch.ones_like(rows)), False
    if not _is_causal(logits) and image_tokens(model.config) and takes(model, FOLLOWS):
        # PaliGemma reads its prompt bidirectionally, and tokens marked as following it causally
        logits, follows = _read(model, rows, torch.ones_like(rows), **{FOLLOWS: torch.ones_like(rows)}), True
    return Reading(_is_causal(logits), _needs_position_ids(model, rows[:1], logits[:1], follows))


def _is_causal(logits: Tensor) -> bool:  # (3, s, v)
    """Whether a text, the text with another last token, and with another first token show that later tokens are unseen.

    Rounding can change earlier columns a little (a mixture of experts multiplies tokens in different groups), but far
    less than a change of the first token changes the columns after it.
    """
    if logits.ndim != 3:
        return False
    backward = (logits[1] - logits[0])[:-1].abs().max()
    forward = (logits[2] - logits[0])[1:].abs().max()
    return not bool(backward > NOISE * forward)


def continues_texts(model: PreTrainedModel) -> bool:
    """Whether token labels are the next tokens, as for a language model, unlike for a tagger or masked tokens."""
    return model.can_generate() or (not is_classifier(model) and reading_of(model).causal)


def context_of(model: PreTrainedModel) -> int:
    """Return the number of tokens of prompt and answer a model can read; :data:`CONTEXT` if it states no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return CONTEXT if limit is None else int(limit)


def keeps_its_columns(model: PreTrainedModel) -> bool:
    """Whether a column's hidden states stay the same whatever is read after it.

    Those of a prompt can then be computed once and used with any continuation. This never holds for models that read
    images: they attend to whole images and prefixes bidirectionally, and keep the positions of images as state.
    """
    if image_tokens(model.config):
        return False
    return not angles_depend_on_length(model.config) and reading_of(model).causal


def angles_depend_on_length(config: PretrainedConfig) -> bool:
    """Whether the length of a batch changes the angles of all its positions (RoPE ``dynamic`` or ``longrope``)."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope, *(of_a_layer for of_a_layer in rope.values() if isinstance(of_a_layer, Mapping))]
    return any(
        "dynamic" in str(kind.get("rope_type")) or kind.get("rope_type") == "longrope" for kind in kinds
    )


# --- positions ------------------------------------------------------------------------------------------------------


def position_ids_for(
    model: PreTrainedModel, attention: Tensor | None, columns: int, others: Mapping[str, Any]
) -> Tensor | None:  # (b, s) -> (b, columns)
    """Return position ids if a model needs them: if there is padding before or between the tokens of a row.

    With images or audio, only the model knows the positions.

    Args:
        model: the base model.
        attention: 1 for real tokens, over all columns, including cached ones; None if all are real.
        columns: the number of last columns that the model is about to read.
        others: its other arguments.
    """
    if not isinstance(attention, Tensor) or attention.ndim != 2:
        return None
    if any(
        isinstance(value, Tensor) and value.ndim > 1 and name not in OF_TEXT for name, value in others.items()
    ):
        return None
    if model in _found and not _found[model].needs_position_ids:  # avoids reading the mask from the device
        return None
    real = attention.bool()
    if not bool((real[:, 1:] > real[:, :-1]).any()) or not reading_of(model).needs_position_ids:
        return None
    return position_ids_of(attention)[:, -columns:]


def takes(model: PreTrainedModel, argument: str) -> bool:
    """Whether a model's forward takes an argument by name, such as ``position_ids``."""
    return argument in inspect.signature(model.forward).parameters


def position_ids_of(attention: Tensor) -> Tensor:  # (b, s) -> (b, s)
    """Number the real tokens of each row from 0, wherever the padding is."""
    return (attention.long().cumsum(-1) - 1).clamp(min=0)


def _needs_position_ids(model: PreTrainedModel, text: Tensor, alone: Tensor, follows: bool) -> bool:  # (1, n)
    """Whether a left-padded row is read as it would be without padding only if its positions are given.

    A model with its own rule reads the row correctly without them (RoBERTa's positions start after the padding index),
    or even computes the same ones (Qwen2-VL, from the mask), and knows more than the mask: images.
    """
    if not takes(model, "position_ids"):
        return False
    attention = F.pad(torch.ones_like(text), (3, 0))
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    padded = F.pad(text, (3, 0), value=0 if pad is None else pad)
    types = {FOLLOWS: torch.ones_like(padded)} if follows else {}
    own = _read(model, padded, attention, **types)
    try:
        given = _read(model, padded, attention, position_ids=position_ids_of(attention), **types)
    except (RuntimeError, ValueError, IndexError):  # positions of another shape
        return False
    if alone.ndim == 3 or alone.shape == text.shape:  # columns of logits, or of scores of where a span starts
        own, given = own[:, -text.shape[1] :], given[:, -text.shape[1] :]
    if torch.equal(own, given):
        return False
    largest = alone.abs().max().clamp(min=1e-6)
    by_itself, numbered = (float((found - alone).abs().max() / largest) for found in (own, given))
    if min(by_itself, numbered) > CLOSE:
        log.warning(
            "%s reads a left-padded row differently from the same row without padding (its logits differ by %.2g of "
            "the largest): use rows of equal length, or pad on the right",
            type(model).__name__,
            min(by_itself, numbered),
        )
    return numbered <= max(by_itself, CLOSE)


# --- reading a few tokens -------------------------------------------------------------------------------------------


@torch.no_grad()
def _read(model: PreTrainedModel, ids: Tensor, attention: Tensor, **more: Tensor) -> Tensor:
    """Return the logits of a pass, or the first output of a model without a head."""
    inputs = {"input_ids": ids, "attention_mask": attention, **more}
    output = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()})
    return output.get("logits", output[0]).float()  # a router loss can come before the logits


def evaluating(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Run a model in evaluation mode inside the block, without dropout."""
    return replaced((module, "training", False) for module in model.modules() if module.training)


def _ordinary_tokens(model: PreTrainedModel, count: int) -> list[int]:
    """Return distinct tokens that no setting of the model uses, such as for padding or images."""
    config = model.config.get_text_config()
    named: set[int] = set()
    for settings in (model.config.to_dict(), config.to_dict()):
        for name, value in settings.items():
            if name.endswith(("token_id", "token_index")) and value is not None:
                named.update(value if isinstance(value, list) else [value])
    ordinary = [token for token in range(min(config.vocab_size, 1000)) if token not in named]
    if len(ordinary) >= count:
        return ordinary[:: len(ordinary) // count][:count]
    if len(ordinary) < 2:
        raise ValueError(f"it has {len(ordinary)} ordinary tokens, too few for the test")
    one, other = ordinary[:2]  # a text that begins and ends with one token, and another to replace it
    return [*(one if i % 3 else other for i in range(1, count - 1)), one, other]
