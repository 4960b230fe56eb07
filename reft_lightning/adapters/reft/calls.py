"""The state of a call: what one forward pass or one generation of an adapted model needs while it runs.

A call may start another: a logits processor asks a model in the middle of a generation. So calls form a stack. Only the
innermost one edits, and the outer one goes on where it stood. Each thread has its own stack.

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
    weight: float = 1.0  # in a call, times the adapter's scale
    rows: Tensor | None = None  # (b,) bool, those it edits; None for all


class Edit(NamedTuple):
    """What one adapter does at one site."""

    adapter: str
    layer: str
    weight: float
    indices: list[Tensor]  # (n,) flat token indices for each of its interventions


@dataclass
class EditPlan:
    """What the hooks do during one pass of the base model, or of one of its stacks."""

    edits: dict[str, list[Edit]]  # site -> one after the other, or added up
    tokens: Tensor  # (b, s) or (b, s, d), what the pass reads; sizes in numbers would be constants to torch.compile
    differentiable: bool  # whether the pass records gradients
    spans: Spans  # prompt and target of what is read
    prompt: Tensor | None = None  # (b s,) bool, the tokens of prompts, where an intervention sees rows

    @property
    def edits_anything(self) -> bool:
        """Whether any token is selected."""
        return any(index.numel() for edits in self.edits.values() for edit in edits for index in edit.indices)


@dataclass
class Call:
    """One forward pass or one generation; what outlives a single pass of the base model is a field here."""

    model: nn.Module  # the adapted model that was called
    adapters: Mapping[str, Any]  # name -> :class:`~.adapter.Adapter`, all that are there
    spans: Spans  # its prompt and target; of an encoder and a decoder, what the encoder reads
    choices: tuple[Choice, ...]  # the adapters that it uses
    summed: bool  # whether their edits are added up
    nulled: bool  # whether edits remove what they would add; a block that is run again asks the call, too
    rows: Mapping[Orthonormal, Tensor]  # R (r, d) of each intervention, computed once
    plan: EditPlan | None = None  # of the base model's current pass; a generation makes several
    begun: bool = False  # whether the base model has read anything
    edited: bool = False  # whether any token was selected so far
    given: Mapping[str, Tensor] = field(default_factory=dict)  # name -> (b, ...), of each row
    kept: dict[str, dict[Any, Tensor]] = field(default_factory=dict)  # adapter -> what it found in prompts
    penalties: list[Tensor] = field(default_factory=list)  # of its edits
    decoder: Spans | None = None  # what the decoder of an encoder-decoder reads; None until its first pass
    # (adapter, layer, number) -> Tokens.source
    sources: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)
    reads_sources: bool = False  # whether it edits nothing, and fills them in

    def again(self) -> Call:
        """Return a call that goes on from here as this one does, and leaves this one as it is."""
        return replace(self, kept={name: dict(kept) for name, kept in self.kept.items()}, penalties=[])


class _Stack(threading.local):
    innermost: Call | None = None


_stack = _Stack()


def call_of(model: nn.Module) -> Call | None:
    """Return the call under way in this thread, if it is one of this model, not of another that it calls."""
    call = _stack.innermost
    return call if call is not None and call.model is model else None


@contextmanager
def running(call: Call | None) -> Iterator[None]:
    """Make a call the innermost one inside the block; None edits nothing."""
    outer, _stack.innermost = _stack.innermost, call
    try:
        with lend({} if call is None else call.rows):
            yield
    finally:
        _stack.innermost = outer
