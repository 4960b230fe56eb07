r"""Positions P: the tokens to edit, as a pure function of masks.

========== ==================================================== ==================================
term       tokens                                               positions (``tied="position"``)
========== ==================================================== ==================================
fN         the first N tokens of the prompt                     1 .. N from the left
lN         the last N tokens of the prompt                      1 .. N from the right
prompt     every token of the prompt                            unbounded
prompt:S   a share S of them, evenly spread, with the last one  unbounded
image      the image tokens of the prompt                       unbounded
image:S    a share S of them, evenly spread                     unbounded
text       the other tokens of the prompt                       unbounded
text:S     a share S of them                                    unbounded
given      the tokens of the prompt that ``edit_mask`` marks    unbounded
given:S    a share S of them                                    unbounded
critical:N the N tokens of the prompt that the others attend to unbounded
           most, found by a first pass of the base model
decode     every token after the prompt (target or generated)   unbounded
decode:N   the first N tokens after the prompt                  1 .. N
all        every token                                          unbounded
========== ==================================================== ==================================

Terms are added: ``f7+l7``, ``prompt+decode:8``, ``l7+image:0.01``. ``fN`` and ``lN`` count text tokens: image tokens
in the prompt, often right after its first token, are skipped. For anything else that depends on the input, use
``given``: a mask (b, s) in each call of the model, which a run makes from marks (``data.marks``). A callable
``(prompt_mask, target_mask) -> mask``, all (b, s) bool, can select any tokens.

In a short prompt of n tokens, the counts of ``fp+ls`` are clipped so that the two never overlap:

=============== =============================================== ==============================================
clip            p becomes                                       s becomes
=============== =============================================== ==============================================
paper           n < p + s: min(p, floor(n / 2))                 n < p + s: min(s, ceil(n / 2))
floor           always: min(p, floor(n / 2))                    always: min(s, floor(n / 2))
=============== =============================================== ==============================================

``paper`` is Wu et al. 2024, sec. 4.1; ``floor`` is the authors' code (pyreft's ``get_intervention_locations``), which
also halves prompts that are long enough for only ``fN`` or ``lN``.

Shapes: b rows, s columns. A prompt need not be contiguous or start at any particular column: tokens that neither mask
covers are padding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from ...suggest import check_choice

MaskFunction = Callable[[Tensor, Tensor], Tensor]
CLIPS = ("paper", "floor")
SYNTAX = (
    "fN, lN, fN+lM, prompt, image, text, given, critical:N, all, decode, decode:N and sums of them, with N >= 1, and "
    "prompt:S, image:S, text:S or given:S with a share 0 < S < 1"
)
MOST = 2**31 - 1  # the largest count of a term
OF_PROMPT = ("prompt", "image", "text", "given")  # terms that select all of some tokens, or a share of them


@dataclass(frozen=True)
class Term:
    """One term of a position specification: a kind and, if it is bounded, the number of positions."""

    kind: str
    count: int | None = None
    share: float | None = None

    @property
    def slots(self) -> int | None:
        """The number of positions; None for as many as the text has."""
        return None if self.kind == "critical" else self.count

    def __str__(self) -> str:
        if self.share is not None:
            return f"{self.kind}:{np.format_float_positional(self.share)}"
        if self.count is None:
            return self.kind
        return f"{self.kind}{self.count}" if self.kind in "fl" else f"{self.kind}:{self.count}"


@dataclass(frozen=True)
class Positions:
    """A parsed specification: terms whose tokens never overlap, or a callable, and the clip for short prompts."""

    terms: tuple[Term, ...]
    function: MaskFunction | None = None
    clip: str = "paper"

    @property
    def reaches_decode(self) -> bool:
        """Whether tokens after the prompt can be selected."""
        return self.function is not None or any(term.kind in ("decode", "all") for term in self.terms)

    @property
    def needs_prompt(self) -> bool:
        """Whether every row needs a prompt."""
        return any(term.kind in ("f", "l", *OF_PROMPT, "critical") for term in self.terms)

    @property
    def needs_mask(self) -> bool:
        """Whether each call must mark the tokens."""
        return any(term.kind == "given" for term in self.terms)

    @property
    def tells_images_apart(self) -> bool:
        """Whether the selection depends on which tokens are images."""
        return any(term.kind in ("f", "l", "image", "text") for term in self.terms)

    @property
    def share_of_images(self) -> float | None:
        """The share of image tokens to edit in a vision tower, which sees only images; None for all.

        Raises:
            ValueError: if the positions refer to text.
        """
        if len(self.terms) == 1 and self.terms[0].kind in ("image", "all"):
            return self.terms[0].share
        raise ValueError(
            f"a vision tower and its connector see only images: positions must be image or image:S there; got {self}"
        )

    @property
    def critical(self) -> int | None:
        """The number of critical tokens to find in a first pass; None if there are none."""
        return next((term.count for term in self.terms if term.kind == "critical"), None)

    @property
    def groups(self) -> int:
        """The number of groups (``tied="group"``), one per term."""
        return 1 if self.function is not None else len(self.terms)

    def slots(self) -> list[int]:
        """Return the number of distinct positions in each group.

        Raises:
            ValueError: if a group has no fixed number of positions.
        """
        counts = [None] if self.function is not None else [term.slots for term in self.terms]
        if None in counts:
            raise ValueError(
                f"tied='position' needs a fixed number of positions, but {self} selects as many as the text has; "
                "use tied='group' or 'all', or fN, lN, decode:N"
            )
        return [count for count in counts if count is not None]

    def select(
        self, prompt: Tensor, target: Tensor, marks: Mapping[str, Tensor] = MappingProxyType({})
    ) -> list[Tensor]:  # (b, s) each -> [(b, s)] per group
        """Return, for each group, the slot of every token: 0, 1, ..., or -1 if it is not selected.

        Args:
            prompt: (b, s) bool, the tokens of the prompt.
            target: (b, s) bool, the tokens after it.
            marks: (b, s) bool each: ``edit``, tokens marked by the caller; ``critical``, tokens found by the first
                pass; ``image``, image tokens. Absent if there are none.

        Raises:
            ValueError: if needed marks are missing, or a function does not return a mask.
        """
        if self.needs_mask and "edit" not in marks:
            raise ValueError(
                f"the positions {self} need edit_mask (b, s), which marks the tokens of the prompt to edit"
            )
        if self.function is not None:
            chosen = self.function(prompt, target)
            if chosen.shape != prompt.shape or chosen.dtype != torch.bool:
                raise ValueError(
                    f"a position function must return a bool mask of shape {tuple(prompt.shape)}; "
                    f"got {chosen.dtype} of shape {tuple(chosen.shape)}"
                )
            return [torch.where(chosen & (prompt | target), 0, -1)]
        image = prompt & marks["image"] if "image" in marks else torch.zeros_like(prompt)
        text = prompt & ~image
        parts = {"prompt": prompt, "image": image, "text": text, "given": prompt & marks.get("edit", prompt)}
        if self.critical:
            parts["critical"] = prompt & marks["critical"]
        n = text.sum(-1, keepdim=True)  # (b, 1)
        from_left = text.cumsum(-1) - 1
        first, last = self._clipped(n)

        def slots(term: Term) -> Tensor:  # -> (b, s)
            if term.kind in parts:
                return spread(parts[term.kind], term.share)
            if term.kind == "f":
                return torch.where(text & (from_left < first), from_left, -1)
            if term.kind == "l":
                from_right = n - 1 - from_left
                return torch.where(text & (from_right < last), from_right, -1)
            if term.kind == "all":
                return spread(prompt | target, None)
            if term.count is None:
                return spread(target, None)  # decode
            after = target.cumsum(-1) - 1
            return torch.where(target & (after < term.count), after, -1)

        return [slots(term) for term in self.terms]

    def _clipped(self, n: Tensor) -> tuple[Tensor, Tensor]:  # (b, 1) -> (b, 1), (b, 1)
        """Return the numbers of tokens that fN and lN select in prompts of n tokens."""
        p, s = (next((t.count for t in self.terms if t.kind == kind), 0) or 0 for kind in "fl")
        if self.clip == "floor":
            return (n // 2).clamp(max=p), (n // 2).clamp(max=s)
        short = n < p + s
        return torch.where(short, (n // 2).clamp(max=p), p), torch.where(short, (n - n // 2).clamp(max=s), s)

    def __str__(self) -> str:
        if self.function is not None:
            return f"<callable {self.function.__module__}.{getattr(self.function, '__qualname__', self.function)}>"
        return "+".join(map(str, self.terms))


def spread(chosen: Tensor, share: float | None) -> Tensor:  # (b, s) bool -> (b, s)
    """Return slot 0 for an evenly spread share of each row's chosen tokens, at least one; without a share, for all."""
    if share is not None:
        n = chosen.sum(-1, keepdim=True).clamp(min=1)  # (b, 1)
        kept, place = (n * share + 1e-6).long().clamp(min=1), chosen.cumsum(-1) - 1
        chosen = chosen & ((place + 1) * kept // n > place * kept // n)
    return torch.where(chosen, 0, -1)


def parse_positions(spec: str | MaskFunction | Positions, clip: str = "paper") -> Positions:
    """Parse a specification such as ``f7+l7``.

    Args:
        spec: terms, or a callable on masks; of a parsed specification, only the clip is replaced.
        clip: how to clip prompts that are too short: ``paper`` or ``floor``, see the top of this file.

    Raises:
        ValueError: if a term is malformed, repeated or overlaps another, or the clip is unknown.
    """
    check_choice("clip", clip, CLIPS)
    if isinstance(spec, Positions):
        return spec if spec.clip == clip else replace(spec, clip=clip)
    if callable(spec):
        return Positions((), spec, clip)
    if not isinstance(spec, str):
        raise ValueError(
            f"positions must be a string or a callable on masks; got {spec!r}; allowed: {SYNTAX}"
        )
    return Positions(_parse_terms(spec), clip=clip)


@cache  # every layer parses its positions
def _parse_terms(spec: str) -> tuple[Term, ...]:
    terms = tuple(_parse_term(part.strip(), spec) for part in spec.split("+"))
    kinds = [term.kind for term in terms]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise ValueError(f"positions {spec!r} contain {kind!r} twice; each kind is allowed only once")
    covering = {
        "text": {"f", "l"},
        "prompt": {"f", "l", "image", "text"},
        "given": {"f", "l", "prompt", "image", "text"},
        "critical": {"f", "l", *OF_PROMPT},
        "all": {"f", "l", *OF_PROMPT, "critical", "decode"},
    }
    for kind, covered in covering.items():
        overlap = covered & set(kinds) if kind in kinds else set()
        if overlap:
            raise ValueError(
                f"positions {spec!r} overlap: {kind!r} already covers {', '.join(sorted(overlap))}; "
                "interventions at one site need disjoint positions"
            )
    return terms


def _parse_term(part: str, spec: str) -> Term:
    if part in (*OF_PROMPT, "all", "decode"):
        return Term(part)
    if share := re.fullmatch(rf"({'|'.join(OF_PROMPT)}):(0?\.\d*[1-9]\d*)", part):
        return Term(share[1], share=float(share[2]))
    match = re.fullmatch(r"([fl])([1-9]\d*)|(decode|critical):([1-9]\d*)", part)
    if not match:
        raise ValueError(f"malformed positions {spec!r}: cannot read {part!r}; allowed: {SYNTAX}")
    count = int(match[2] or match[4])
    if count > MOST:
        raise ValueError(
            f"positions {spec!r}: {part} counts more tokens than any text has; allowed: {SYNTAX}"
        )
    return Term(match[1] or match[3], count)
