"""The state of a call: one forward pass or one generation of an adapted model, while it runs.

A call can start another: a logits processor may call a model in the middle of a generation. Calls therefore form a
stack. Only the innermost one edits, and the outer one then continues where it was. Each thread has its own stack.

Shapes: b rows, s columns, n selected tokens, r rank, d width.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...interventions import Orthonormal, lend
from ..masks import Spans


class Choice(NamedTuple):
    """An adapter that a call uses."""

    adapter: str
    weight: float = 1.0  # in a call, multiplied by the adapter's scale
    rows: Tensor | None = None  # (b,) bool, the rows it edits; None for all


class Edit(NamedTuple):
    """The edit of one adapter at one site."""

    adapter: str
    layer: str
    weight: float
    indices: list[Tensor]  # (n,) flat token indices for each of its interventions


@dataclass
class EditPlan:
    """The edits of one pass of the base model, or of one of its stacks."""

    edits: dict[str, list[Edit]]  # site -> edits, applied in sequence or summed
    tokens: Tensor  # (b, s) or (b, s, d), the pass's input; torch.compile would take plain sizes as constants
    differentiable: bool  # whether the pass records gradients
    spans: Spans  # prompt and target of the input
    prompt: Tensor | None = None  # (b s,) bool, prompt tokens, if an intervention sees rows

    @property
    def edits_anything(self) -> bool:
        """Whether any token is selected."""
        return any(index.numel() for edits in self.edits.values() for edit in edits for index in edit.indices)


@dataclass
class Call:
    """One forward pass or one generation; its fields hold everything that outlives a single pass of the base model."""

    model: nn.Module  # the adapted model that was called
    adapters: Mapping[str, Any]  # name -> :class:`~.adapter.Adapter`, all of the model's
    spans: Spans  # prompt and target; in an encoder-decoder, those of the encoder
    choices: tuple[Choice, ...]  # the adapters in use
    summed: bool  # whether their edits are summed
    nulled: bool  # whether edits remove what they would add, also when a block is recomputed
    rows: Mapping[Orthonormal, Tensor]  # R (r, d) of each intervention, computed once
    plan: EditPlan | None = None  # for the base model's current pass; a generation has several
    begun: bool = False  # whether the base model has read anything
    edited: bool = False  # whether any token was selected so far
    given: Mapping[str, Tensor] = field(default_factory=dict)  # name -> (b, ...), values for each row
    kept: dict[str, dict[Any, Tensor]] = field(default_factory=dict)  # adapter -> values it found in prompts
    penalties: list[Tensor] = field(default_factory=list)  # penalties of its edits
    decoder: Spans | None = None  # the spans of an encoder-decoder's decoder; None until its first pass
    # (adapter, layer, number) -> Tokens.source
    sources: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)
    reads_sources: bool = False  # whether it fills in `sources` instead of editing

    def again(self) -> Call:
        """Return an independent call that continues from the current state."""
        return replace(self, kept={name: dict(kept) for name, kept in self.kept.items()}, penalties=[])


class _Stack(threading.local):
    innermost: Call | None = None


_stack = _Stack()


def call_of(model: nn.Module) -> Call | None:
    """Return this thread's innermost call if it is a call of this model, not of another."""
    call = _stack.innermost
    return call if call is not None and call.model is model else None


@contextmanager
def running(call: Call | None) -> Iterator[None]:
    """Make a call the innermost one inside the block; with None, nothing is edited."""
    outer, _stack.innermost = _stack.innermost, call
    try:
        with lend({} if call is None else call.rows):
            yield
    finally:
        _stack.innermost = outer
