"""Which tokens of a batch are prompt, which come after it, and which columns a call reads.

Shapes: b rows, s columns. Masks are bool; padding is what neither mask covers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Spans:
    """The prompt and target tokens of one call, known up to a column and predictable beyond it."""

    prompt: Tensor  # (b, s)
    target: Tensor  # (b, s)
    generating: bool = False  # whether columns from s on are generated tokens
    read: int = 0  # how many columns the base model has read
    # name -> (b, s), what is known of tokens: `edit`, those that the caller marks, `image`, the places of images
    marks: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """The number of columns s that the masks describe."""
        return self.prompt.shape[1]

    def next_columns(self, count: int, attention: Any, cached: int | None = None) -> slice:
        """Return the columns that the base model is about to read, and count them as read.

        A forward pass reads the last columns. A generation reads the last columns of its mask; where the model is
        given none, or one that is no longer of rows and columns, it goes on after what its cache holds (less than was
        read where a draft of speculative decoding was rejected), or without a cache reads all of it again. A cache that
        holds nothing after a pass is none (RecurrentGemma's, up to transformers 5.22): its state is elsewhere.

        Args:
            count: how many columns it reads.
            attention: the mask that it is given.
            cached: how many columns its cache holds, as far as that is known; the first pass then may read more
                than the prompt, which are a draft.

        Raises:
            ValueError: if it reads more columns than there are.
        """
        if not self.generating:
            start = self.width - count
        elif isinstance(attention, Tensor) and attention.ndim == 2:
            start = attention.shape[1] - count
        elif cached is not None and (cached or not self.read):
            start = cached
        elif self.read == 0:
            start = min(self.width - count, 0)  # the prompt, or its first chunk
        elif count == self.read + 1:
            start = 0
        else:
            start = self.read
        if start < 0:
            raise ValueError(
                f"the model reads {count} columns where the masks cover {start + count}: pass masks of all columns "
                "(positions mean nothing in a model that reads more than its text)"
            )
        self.read = start + count
        return slice(start, self.read)

    def upto(self, stop: int, rows: int) -> Spans:
        """Return the masks for ``rows`` rows and all columns, at least ``stop`` of them; no new token has a mark.

        A call may read fewer columns than are known (a prompt read in chunks): which tokens are its first and
        last does not depend on that.
        Beam search and ``num_return_sequences`` repeat every row, next to each other.
        """
        extra = max(stop - self.width, 0)
        repeats, rest = divmod(rows, len(self.prompt))
        if rest:
            raise ValueError(f"the model reads {rows} rows, no multiple of the batch of {len(self.prompt)}")

        def whole(mask: Tensor, value: bool = False) -> Tensor:
            mask = F.pad(mask, (0, extra), value=value) if extra else mask
            return mask.repeat_interleave(repeats, 0)

        marks = {name: whole(mark) for name, mark in self.marks.items()}
        return replace(self, prompt=whole(self.prompt), target=whole(self.target, True), marks=marks)

    def of_rows(self, rows: Tensor | None) -> Spans:  # (b,); of as many rows, or a multiple of them
        """Return the spans without the tokens of other rows."""
        if rows is None:
            return self
        kept = rows.to(self.prompt.device).repeat_interleave(len(self.prompt) // len(rows)).unsqueeze(-1)
        return replace(self, prompt=self.prompt & kept, target=self.target & kept)


def as_mask(name: str, mask: Tensor) -> Tensor:
    """Return a mask as bool; strengths of tokens, of which every one but 0 would count as 1, are none."""
    if mask.is_floating_point() and not torch.equal(mask, mask.bool().to(mask.dtype)):
        raise ValueError(
            f"{name} says which tokens, by 0 and 1, and holds other numbers: the strength of edits is that of an "
            "adapter (its scale) or of a row (adapter_names)"
        )
    return mask.bool()


def check_one_text(attention: Any, rows: int, given: Mapping[str, Any]) -> None:
    """Refuse rows into which several texts are packed, as far as arguments of transformers tell.

    Args:
        attention: None, or (b, s), 1 for real tokens; any other says which tokens read which.
        rows: b.
        given: further arguments of forward: ``position_ids`` or ``seq_idx`` (b, s), ``cu_seq_lens_q`` (texts + 1,).

    Raises:
        ValueError: for several texts in a row, or a mask that does not say which tokens are real.
    """
    if attention is not None and not (isinstance(attention, Tensor) and attention.ndim == 2):
        shape = tuple(attention.shape) if isinstance(attention, Tensor) else type(attention).__name__
        raise ValueError(
            f"attention_mask says which tokens are real, by 1 and 0 in their shape (b, s); got {shape}. One of pairs "
            "of tokens does not say where a text begins: give each text a row of its own"
        )
    bounds, places, texts = (given.get(name) for name in ("cu_seq_lens_q", "position_ids", "seq_idx"))
    if (
        (bounds is not None and len(bounds) - 1 > rows)
        or (places is not None and places.ndim == 2 and _falls(places, attention))
        or (texts is not None and _falls(-texts, attention))
    ):
        raise ValueError(
            "several texts are packed into a row, but positions are those of one text: give each a row of its "
            "own (of trl, packing=False and padding_free=False)"
        )


def _falls(numbers: Tensor, attention: Tensor | None) -> bool:
    """Whether the numbers of a row's real tokens, (b, s) or those of its last columns, ever become smaller."""
    if numbers.is_meta:  # no values
        return False
    real = torch.ones_like(numbers).bool() if attention is None else attention[:, -numbers.shape[1] :].bool()
    so_far = numbers.masked_fill(~real, torch.iinfo(numbers.dtype).min).cummax(-1).values
    return bool((real & (numbers < so_far)).any())


def spans_of(attention: Tensor, labels: Tensor | None, prompt_mask: Tensor | None) -> Spans:
    """Split the real tokens of a batch into prompt and target.

    ``prompt_mask`` decides; without it the prompt is what precedes the first label of its row (an eos without a label
    after the target is not part of it); without labels it is everything.

    Args:
        attention: (b, s), 1 for real tokens.
        labels: (b, s), of tokens; or None.
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
        prompt = real & as_mask("prompt_mask", prompt_mask)
    elif labels is not None:
        if labels.shape != real.shape:
            raise ValueError(
                f"labels have the shape {tuple(labels.shape)}, the tokens {tuple(real.shape)}: labels of only "
                "the last columns need a prompt_mask"
            )
        prompt = real & ((labels != -100).cumsum(-1) == 0)
    else:
        prompt = real
    return Spans(prompt, real & ~prompt)


def asked_again(spans: Spans, labels: Tensor) -> bool:
    """Whether a row has tokens without a label between two with one: the questions of a conversation."""
    labelled = labels != -100
    before_another = labelled.flip(-1).cumsum(-1).flip(-1) > 0
    return bool((spans.target & ~labelled & before_another).any())


def spans_of_labels(labels: Tensor, attention: Tensor | None) -> Spans:
    """Split what the decoder of an encoder-decoder reads into prompt and target, by what it learns to write.

    Its column j is the token before label j: what stands before and at the first label is its prompt, at least the
    token that every answer starts with.

    Args:
        labels: (b, t) token labels.
        attention: (b, t), 1 for real tokens; without it, those up to the last label are.
    """
    labelled = labels != -100
    real = labelled.flip(-1).cumsum(-1).flip(-1) > 0 if attention is None else attention.bool()
    prompt = real & (F.pad(labelled, (1, 0))[:, :-1].cumsum(-1) == 0)
    return Spans(prompt, real & ~prompt)


def spans_of_start(tokens: Tensor, read: int, generating: bool, attention: Any) -> Spans:
    """Split what a decoder reads of which there are no labels: its first token is the prompt, or all it is given.

    Args:
        tokens: (b, s) or (b, s, d), what it is about to read.
        read: columns that are in its cache.
        generating: whether it starts to generate after them; they are the prompt then.
        attention: (b, s), 1 for real tokens; anything else is no mask of these columns.
    """
    b, s = tokens.shape[:2]
    real = torch.ones(b, read + s, dtype=torch.bool, device=tokens.device)
    if isinstance(attention, Tensor) and attention.shape == real.shape:
        real = attention.bool()
    prompt = real if generating else real & (real.cumsum(-1) == 1)
    return Spans(prompt, real & ~prompt, generating, read)


def marked(spans: Spans, **masks: Tensor | None) -> Spans:  # (b, s) each
    """Return the spans with what is known of tokens: ``edit`` of ``edit_mask``, ``image`` of ``image_mask``."""
    marks = {name: as_mask(f"{name}_mask", mask) for name, mask in masks.items() if mask is not None}
    for name, mark in marks.items():
        if mark.shape != spans.prompt.shape:
            raise ValueError(
                f"{name}_mask must have the shape {tuple(spans.prompt.shape)}; got {tuple(mark.shape)}"
            )
    return replace(spans, marks={**spans.marks, **marks})


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
