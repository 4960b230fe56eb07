"""Which tokens of a batch belong to the prompt, which come after it, and which columns a call reads.

Shapes: b rows, s columns. Masks are bool; tokens that neither mask covers are padding.
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
    """The prompt and target tokens of one call, known for its columns and predictable beyond them."""

    prompt: Tensor  # (b, s)
    target: Tensor  # (b, s)
    generating: bool = False  # whether columns from s on are generated tokens
    read: int = 0  # the number of columns the base model has read
    # name -> (b, s), marked tokens: `edit`, marked by the caller, and `image`, image tokens
    marks: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """The number of columns s that the masks describe."""
        return self.prompt.shape[1]

    def next_columns(self, count: int, attention: Any, cached: int | None = None) -> slice:
        """Return the columns that the base model is about to read, and count them as read.

        A forward pass reads the last columns. Generation reads the last columns of its mask. If the model gets no mask,
        or one that no longer has rows and columns, it continues after the cached columns (fewer than were read, if a
        draft of speculative decoding was rejected) or, without a cache, reads everything again. A cache that is empty
        after a pass does not count (RecurrentGemma's, up to transformers 5.22): its state is elsewhere.

        Args:
            count: the number of columns it reads.
            attention: the mask that it gets.
            cached: the number of columns in its cache, None if unknown; if known, the first pass may read more than the
                prompt, namely a draft.

        Raises:
            ValueError: if it reads more columns than there are.
        """
        if not self.generating:
            start = self.width - count
        elif isinstance(attention, Tensor) and attention.ndim == 2:
            start = min(attention.shape[1] - count, self.read)  # BLOOM's covers a whole static cache
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
                f"the model reads {count} columns, but the masks cover {start + count}: pass masks of all columns "
                "(positions are undefined in a model that reads more than its text)"
            )
        self.read = start + count
        return slice(start, self.read)

    def upto(self, stop: int, rows: int) -> Spans:
        """Return the masks for ``rows`` rows and all columns, at least ``stop``; new tokens are unmarked.

        A call can read fewer columns than are known (a prompt read in chunks) without changing which tokens are first
        and last. Beam search and ``num_return_sequences`` repeat every row, with the copies next to each other.
        """
        extra = max(stop - self.width, 0)
        repeats, rest = divmod(rows, len(self.prompt))
        if rest:
            raise ValueError(
                f"the model reads {rows} rows, not a multiple of the batch size {len(self.prompt)}"
            )

        def whole(mask: Tensor, value: bool = False) -> Tensor:
            mask = F.pad(mask, (0, extra), value=value) if extra else mask
            return mask.repeat_interleave(repeats, 0)

        marks = {name: whole(mark) for name, mark in self.marks.items()}
        return replace(self, prompt=whole(self.prompt), target=whole(self.target, True), marks=marks)

    def of_rows(self, rows: Tensor | None) -> Spans:  # (b,); the spans can have a multiple of b rows
        """Return the spans with only the tokens of the selected rows."""
        if rows is None:
            return self
        kept = rows.to(self.prompt.device).repeat_interleave(len(self.prompt) // len(rows)).unsqueeze(-1)
        return replace(self, prompt=self.prompt & kept, target=self.target & kept)


def as_mask(name: str, mask: Tensor) -> Tensor:
    """Return a mask as bool; reject one of other numbers than 0 and 1, which would all count as 1."""
    if mask.is_floating_point() and not torch.equal(mask, mask.bool().to(mask.dtype)):
        raise ValueError(
            f"{name} must hold only 0 and 1: the strength of edits is set per adapter (its scale) or per row "
            "(adapter_names)"
        )
    return mask.bool()


def check_one_text(attention: Any, rows: int, given: Mapping[str, Any]) -> None:
    """Refuse rows that pack several texts, as far as transformers' arguments show it.

    Args:
        attention: None, or (b, s) with 1 for real tokens; any other mask says which tokens attend to which.
        rows: b.
        given: further arguments of forward: ``position_ids`` or ``seq_idx`` (b, s), ``cu_seq_lens_q`` (texts + 1,).

    Raises:
        ValueError: if a row holds several texts, or the mask does not say which tokens are real.
    """
    if attention is not None and not (isinstance(attention, Tensor) and attention.ndim == 2):
        shape = tuple(attention.shape) if isinstance(attention, Tensor) else type(attention).__name__
        raise ValueError(
            f"attention_mask must have the shape (b, s) of the tokens, with 1 for real ones; got {shape}. A mask over "
            "pairs of tokens does not show where a text begins: give each text its own row"
        )
    bounds, places, texts = (given.get(name) for name in ("cu_seq_lens_q", "position_ids", "seq_idx"))
    if (
        (bounds is not None and len(bounds) - 1 > rows)
        or (places is not None and places.ndim == 2 and _falls(places, attention))
        or (texts is not None and _falls(-texts, attention))
    ):
        raise ValueError(
            "several texts are packed into a row, but positions refer to one text: give each text its own row (in trl, "
            "packing=False and padding_free=False)"
        )


def _falls(numbers: Tensor, attention: Tensor | None) -> bool:
    """Whether the numbers of a row's real tokens, (b, s) or of the last columns only, ever decrease."""
    if numbers.is_meta:  # no values
        return False
    real = torch.ones_like(numbers).bool() if attention is None else attention[:, -numbers.shape[1] :].bool()
    so_far = numbers.masked_fill(~real, torch.iinfo(numbers.dtype).min).cummax(-1).values
    return bool((real & (numbers < so_far)).any())


def spans_of(attention: Tensor, labels: Tensor | None, prompt_mask: Tensor | None) -> Spans:  # (b, s) each
    """Split the real tokens of a batch, those that attention is 1 for, into prompt and target.

    ``prompt_mask`` decides if given. Otherwise the prompt is everything before the first label of its row (an eos
    without a label after the target is not part of it), or, without labels, the whole row.

    Raises:
        ValueError: if the shapes do not match.
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
                f"labels have the shape {tuple(labels.shape)}, the tokens {tuple(real.shape)}: labels for only the "
                "last columns need a prompt_mask"
            )
        prompt = real & ((labels != -100).cumsum(-1) == 0)
    else:
        prompt = real
    return Spans(prompt, real & ~prompt)


def asked_again(spans: Spans, labels: Tensor) -> bool:
    """Whether a row has unlabelled target tokens before later labels, as the questions of a conversation are."""
    labelled = labels != -100
    before_another = labelled.flip(-1).cumsum(-1).flip(-1) > 0
    return bool((spans.target & ~labelled & before_another).any())


def spans_of_labels(labels: Tensor, attention: Tensor | None) -> Spans:  # (b, t) each
    """Split the decoder input of an encoder-decoder into prompt and target, using its labels.

    Column j is the token before label j: columns up to and including the first label are the prompt, at least the
    token that every answer starts with. Without attention, all tokens up to the last label are real.
    """
    labelled = labels != -100
    real = labelled.flip(-1).cumsum(-1).flip(-1) > 0 if attention is None else attention.bool()
    prompt = real & (F.pad(labelled, (1, 0))[:, :-1].cumsum(-1) == 0)
    return Spans(prompt, real & ~prompt)


def spans_of_start(tokens: Tensor, read: int, generating: bool, attention: Any) -> Spans:
    """Split decoder input without labels: the prompt is its first token, or all of it before generation.

    Args:
        tokens: (b, s) or (b, s, d), the tokens it is about to read.
        read: the number of columns in its cache.
        generating: whether it generates after these tokens, which are then the prompt.
        attention: (b, s), 1 for real tokens; any other shape is ignored.
    """
    b, s = tokens.shape[:2]
    real = torch.ones(b, read + s, dtype=torch.bool, device=tokens.device)
    if isinstance(attention, Tensor) and attention.shape == real.shape:
        real = attention.bool()
    prompt = real if generating else real & (real.cumsum(-1) == 1)
    return Spans(prompt, real & ~prompt, generating, read)


def marked(spans: Spans, **masks: Tensor | None) -> Spans:  # (b, s) each
    """Return the spans with marks on tokens: ``edit`` from ``edit_mask``, ``image`` from ``image_mask``."""
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
    """Treat as padding the pad token that ``generate``'s arguments, or the model's defaults, name.

    If there is none, or it is also the end-of-text token, every token is real.
    """
    settings = arguments.get("generation_config") or defaults
    pad, eos = (
        arguments.get(f"{name}_token_id", getattr(settings, f"{name}_token_id")) for name in ("pad", "eos")
    )
    if pad is None or pad in (eos if isinstance(eos, list) else [eos]):
        return torch.ones_like(input_ids)
    return (input_ids != pad).long()
