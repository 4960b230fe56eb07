"""Which tokens of a batch are prompt, which come after it, and their positions.

Shapes: b rows, s columns. Masks are bool; padding is what neither mask covers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Spans:
    """The prompt and target tokens of one call, known up to a column and predictable beyond it.

    Args:
        prompt: (b, s).
        target: (b, s).
        generating: whether columns from s on are generated tokens.
    """

    prompt: Tensor
    target: Tensor
    generating: bool = False

    @property
    def width(self) -> int:
        """The number of columns s that the masks describe."""
        return self.prompt.shape[1]

    def upto(self, stop: int, rows: int) -> tuple[Tensor, Tensor]:  # -> (rows, stop), (rows, stop)
        """Return both masks for ``rows`` rows and all columns, at least ``stop`` of them.

        A call may read fewer columns than are known (a prompt read in chunks): which tokens are its first and
        last does not depend on that.
        Beam search and ``num_return_sequences`` repeat every row, next to each other.
        """
        extra = stop - self.width
        if extra > 0 and not self.generating:
            raise ValueError(
                f"the masks cover {self.width} columns, the model reads {stop}: pass masks of all columns"
            )
        prompt, target = self.prompt, self.target
        if extra > 0:
            prompt, target = F.pad(prompt, (0, extra)), F.pad(target, (0, extra), value=True)
        repeats, rest = divmod(rows, prompt.shape[0])
        if rest:
            raise ValueError(f"the model reads {rows} rows, no multiple of the batch of {prompt.shape[0]}")
        return prompt.repeat_interleave(repeats, 0), target.repeat_interleave(repeats, 0)


def spans_of(attention: Tensor, labels: Tensor | None, prompt_mask: Tensor | None) -> Spans:
    """Split the real tokens of a batch into prompt and target.

    ``prompt_mask`` decides; without it the prompt is what precedes the first label of its row (an eos without a label
    after the target is not part of it); without token labels it is everything.

    Args:
        attention: (b, s), 1 for real tokens.
        labels: (b, s) token labels; labels of whole texts, (b,) or floating-point; or None.
        prompt_mask: (b, s) bool, or None.

    Raises:
        ValueError: for shapes that do not fit each other.
    """
    real = attention.bool()
    if prompt_mask is not None:
        if prompt_mask.shape != real.shape:
            raise ValueError(
                f"prompt_mask must have the shape {tuple(real.shape)}; got {tuple(prompt_mask.shape)}"
            )
        prompt = real & prompt_mask.bool()
    elif labels is not None and labels.ndim == 2 and not labels.is_floating_point():
        if labels.shape != real.shape:
            raise ValueError(
                f"labels have the shape {tuple(labels.shape)}, the tokens {tuple(real.shape)}: labels of only "
                "the last columns need a prompt_mask"
            )
        prompt = real & ((labels != -100).cumsum(-1) == 0)
    else:
        prompt = real
    return Spans(prompt, real & ~prompt)


def position_ids_of(attention: Tensor) -> Tensor:  # (b, s) -> (b, s)
    """Number the real tokens of each row from 0, wherever its padding is."""
    return (attention.long().cumsum(-1) - 1).clamp(min=0)


def numbers_its_own_positions(modules: Mapping[str, nn.Module]) -> bool:
    """Whether a model, given as its modules by path, derives positions from its input ids (RoBERTa and similar).

    Their position table has a padding row, and positions start after it.
    """
    return any(
        isinstance(module, nn.Embedding)
        and module.padding_idx is not None
        and name.endswith("position_embeddings")
        for name, module in modules.items()
    )


def guess_attention(
    input_ids: Tensor, arguments: dict[str, Any], defaults: Any
) -> Tensor:  # (b, s) -> (b, s)
    """Call padding what ``generate``'s arguments, or the model's defaults, name as the pad token.

    Where that is the end-of-text token too, or none is named, every token is real.
    """
    settings = arguments.get("generation_config") or defaults
    pad, eos = (
        arguments.get(f"{name}_token_id", getattr(settings, f"{name}_token_id")) for name in ("pad", "eos")
    )
    if pad is None or pad in (eos if isinstance(eos, list) else [eos]):
        return torch.ones_like(input_ids)
    return (input_ids != pad).long()
