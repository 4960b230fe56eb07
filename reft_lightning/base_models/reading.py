"""How a base model reads a row of tokens: found by trying it on a few of them, once a model.

Neither the name of a class nor a configuration tells it: a decoder can be told to read both ways
(``use_bidirectional_attention``), and a model may derive positions from ids, masks or images.

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

NOISE = 0.05  # of the influence of an earlier token: what rounding may do to logits that nothing changed
# tensors of more than one dimension that a text may come with; any other brings images or sounds
OF_TEXT = ("inputs_embeds", "token_type_ids", "langs", "shift_labels", "encoder_hidden_states")
FOLLOWS = "token_type_ids"  # 1 for what follows a prompt, in models that read prompts in both directions
CONTEXT = 4096  # tokens of prompt and answer, where a model names no limit
CLOSE = 0.05  # of the largest logit: the same text, read under other padding in 16 bits


class Reading(NamedTuple):
    """How a base model reads a row."""

    causal: bool  # whether it has columns of logits, none of which depends on a later token
    needs_position_ids: bool  # whether only with them it reads a row padded on the left as without padding


_found: WeakKeyDictionary[PreTrainedModel, Reading] = WeakKeyDictionary()


def reading_of(model: PreTrainedModel) -> Reading:
    """Return how a base model reads, from a few passes over a few tokens when it is first asked."""
    if model not in _found and reads_two_texts(model):  # the encoder both ways; neither takes position ids
        _found[model] = Reading(causal=False, needs_position_ids=False)
    if model not in _found:
        try:
            _found[model] = _try(bare_copy(model))
        except Exception as error:
            log.debug("%s itself is tried, as it cannot be copied: %s", type(model).__name__, error)
            try:
                with evaluating(model):
                    _found[model] = _try(model)
            except Exception as error:
                _found[model] = Reading(is_decoder(model.config), takes(model, "position_ids"))
                log.warning(
                    "how %s reads a row could not be tried (%s): it is taken for %s",
                    type(model).__name__, error, "a decoder" if _found[model].causal else "an encoder",
                )  # fmt: skip
    return _found[model]


def _try(model: PreTrainedModel) -> Reading:
    *tokens, other = _ordinary_tokens(model, 7)
    rows = torch.tensor([tokens, [*tokens[:-1], other], [other, *tokens[1:]]])
    logits, follows = _read(model, rows, torch.ones_like(rows)), False
    if not _is_causal(logits) and image_tokens(model.config) and takes(model, FOLLOWS):
        # PaliGemma reads its prompt in both directions, and what is said to follow it in one
        logits, follows = _read(model, rows, torch.ones_like(rows), **{FOLLOWS: torch.ones_like(rows)}), True
    return Reading(_is_causal(logits), _needs_position_ids(model, rows[:1], logits[:1], follows))


def _is_causal(
    logits: Tensor,
) -> bool:  # (3, s, v): of a text, of one with another last token, and another first
    """Whether a change of the last token leaves earlier columns as they are.

    Rounding can move them a little (a mixture of experts multiplies other groups of tokens), far less than a change of
    the first token moves the columns after it.
    """
    if logits.ndim != 3:
        return False
    backward = (logits[1] - logits[0])[:-1].abs().max()
    forward = (logits[2] - logits[0])[1:].abs().max()
    return not bool(backward > NOISE * forward)


def continues_texts(model: PreTrainedModel) -> bool:
    """Whether labels of tokens say how a text goes on: of a language model; not of a tagger, or for masked tokens."""
    return model.can_generate() or (not is_classifier(model) and reading_of(model).causal)


def context_of(model: PreTrainedModel) -> int:
    """Return how many tokens of prompt and answer a model reads; :data:`CONTEXT` where it names no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return CONTEXT if limit is None else int(limit)


def keeps_its_columns(model: PreTrainedModel) -> bool:
    """Whether what a model computes for a column stays the same whatever is read after it.

    What is computed once for a prompt may then be used with any continuation. Columns of a model that reads images are
    not used again: it looks at whole images and prefixes in both directions, and notes on itself where images stood.
    """
    if image_tokens(model.config):
        return False
    return not angles_depend_on_length(model.config) and reading_of(model).causal


def angles_depend_on_length(config: PretrainedConfig) -> bool:
    """Whether a longer batch rotates every position of it by other angles (RoPE ``dynamic`` or ``longrope``)."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope, *(of_a_layer for of_a_layer in rope.values() if isinstance(of_a_layer, Mapping))]
    return any(
        "dynamic" in str(kind.get("rope_type")) or kind.get("rope_type") == "longrope" for kind in kinds
    )


# --- positions ------------------------------------------------------------------------------------------------------


def position_ids_for(
    model: PreTrainedModel, attention: Tensor | None, columns: int, others: Mapping[str, Any]
) -> Tensor | None:  # (b, s) -> (b, columns)
    """Return position ids where a model needs them: where padding stands before or between the tokens of a row.

    What images and sounds do to positions only the model knows.

    Args:
        model: the base model.
        attention: 1 for real tokens, of all columns, those of a cache included; None if all are real.
        columns: how many of them, the last ones, the model is about to read.
        others: what else it is given.
    """
    if not isinstance(attention, Tensor) or attention.ndim != 2:
        return None
    if any(
        isinstance(value, Tensor) and value.ndim > 1 and name not in OF_TEXT for name, value in others.items()
    ):
        return None
    if model in _found and not _found[model].needs_position_ids:  # without asking the device for the mask
        return None
    real = attention.bool()
    if not bool((real[:, 1:] > real[:, :-1]).any()) or not reading_of(model).needs_position_ids:
        return None
    return position_ids_of(attention)[:, -columns:]


def takes(model: PreTrainedModel, argument: str) -> bool:
    """Whether a model names an argument, such as ``position_ids``."""
    return argument in inspect.signature(model.forward).parameters


def position_ids_of(attention: Tensor) -> Tensor:  # (b, s) -> (b, s)
    """Number the real tokens of each row from 0, wherever its padding is."""
    return (attention.long().cumsum(-1) - 1).clamp(min=0)


def _needs_position_ids(model: PreTrainedModel, text: Tensor, alone: Tensor, follows: bool) -> bool:  # (1, n)
    """Whether a row padded on the left is read as it is alone only if its positions are given.

    A model with a rule of its own reads the row as well without them (positions that start after a padding row, as
    RoBERTa's), or even computes the same ones (from the mask, as Qwen2-VL), and knows more than the mask: images.
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
            "%s reads a row otherwise when it is padded on the left (its logits differ by %.2g of the largest): give "
            "it rows of one length, or pad on the right",
            type(model).__name__,
            min(by_itself, numbered),
        )
    return numbered <= max(by_itself, CLOSE)


# --- reading a few tokens -------------------------------------------------------------------------------------------


@torch.no_grad()
def _read(model: PreTrainedModel, ids: Tensor, attention: Tensor, **more: Tensor) -> Tensor:
    """Return the logits of a pass, or what a model without a head returns."""
    inputs = {"input_ids": ids, "attention_mask": attention, **more}
    output = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()})
    return output.get("logits", output[0]).float()  # a loss of routers comes before the logits


def evaluating(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Let a model run as in evaluation, without dropout."""
    return replaced((module, "training", False) for module in model.modules() if module.training)


def _ordinary_tokens(model: PreTrainedModel, count: int) -> list[int]:
    """Return different tokens that no setting of the model names, as padding or the place of an image."""
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
        raise ValueError(f"it has {len(ordinary)} ordinary tokens, too few to see how it reads")
    one, other = ordinary[:2]  # a text of one token that begins and ends alike, and another token
    return [*(one if i % 3 else other for i in range(1, count - 1)), one, other]
