"""What an edit may know besides h, and what it may return besides the edit.

Most interventions are functions of single tokens. One that looks at a whole prompt (a gate, the largest activations of
a row), at what the caller says of each row (a concept), or that returns more than hidden states defines ``edit_rows``:

    class Gated(rl.Intervention, name="gated"):
        def edit_rows(self, h, tokens):
            gate = tokens.keep(self, tokens.mean_of_prompts(h @ self.condition) > 0)  # (b,), once a prompt
            return gate[tokens.rows, None] * self.bias

Shapes: b rows, n selected tokens of all rows in their order, m of the longest row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Found(NamedTuple):
    """An edit, and what was found on the way.

    Args:
        edit: (n, d), the difference Phi(h) - h at scale 1.
        penalty: a scalar that joins the loss in training; None for none.
        latents: (n, k), what the intervention detects in its tokens; None for nothing.
    """

    edit: Tensor
    penalty: Tensor | None = None
    latents: Tensor | None = None


@dataclass
class Tokens:
    """Where the n tokens of one edit stand.

    Args:
        rows: (n,), which row of the batch each token is of, in ascending order.
        count: b.
        prompt: (n,) bool, whether a token belongs to its row's prompt.
        kept: what the interventions of one adapter found in the prompts of a call; see :meth:`keep`.
        given: name -> (b, ...), what the caller says of each row (``row_values`` of the model).
        source: (b, m, d) and (b,), the hidden states of another text at the positions of the intervention, and how many
            of them each row has; None without one (``source_ids`` of the model).
        found: filled in by :class:`~.base.Intervention`.
    """

    rows: Tensor
    count: int
    prompt: Tensor
    kept: dict[Any, Tensor] = field(default_factory=dict)
    given: Mapping[str, Tensor] = field(default_factory=dict)
    source: tuple[Tensor, Tensor] | None = None
    found: Found | None = None

    @classmethod
    def alone(cls, h: Tensor) -> Tokens:
        """Return n tokens that are one prompt."""
        n, device = len(h), h.device
        return cls(
            torch.zeros(n, dtype=torch.long, device=device), 1, torch.ones(n, dtype=torch.bool, device=device)
        )

    def counts(self, chosen: Tensor | None = None) -> Tensor:  # (n,) bool -> (b,)
        """Return how many tokens each row has, all or those that are chosen."""
        ones = torch.ones_like(self.rows) if chosen is None else chosen.long()
        return torch.zeros(self.count, dtype=torch.long, device=ones.device).index_add(0, self.rows, ones)

    def sums(self, x: Tensor) -> Tensor:  # (n, ...) -> (b, ...)
        """Return the sum over the tokens of each row."""
        return x.new_zeros(self.count, *x.shape[1:]).index_add(0, self.rows, x)

    def mean_of_prompts(self, x: Tensor) -> Tensor:  # (n, ...) -> (b, ...)
        """Return the mean over the prompt tokens of each row; 0 for a row without any."""
        weights = self.prompt.to(x.dtype) / self.counts(self.prompt).clamp(min=1)[self.rows]
        return self.sums(x * weights.view(-1, *[1] * (x.ndim - 1)))

    @property
    def places(self) -> Tensor:  # (n,)
        """How many tokens of its row come before each."""
        counts = self.counts()
        return torch.arange(len(self.rows), device=counts.device) - (counts.cumsum(0) - counts)[self.rows]

    def padded(self, x: Tensor, value: float = 0.0) -> Tensor:  # (n, ...) -> (b, m, ...)
        """Return the tokens of each row in columns of their own."""
        width = len(x) if x.is_meta or not len(x) else int(self.counts().max())  # on meta at most n
        return x.new_full((self.count, width, *x.shape[1:]), value).index_put((self.rows, self.places), x)

    def of_source(self, last: bool = False) -> Tensor:  # () -> (n, d)
        """Return the hidden state that each token takes from the other text: of the token in its place, or of the last.

        Raises:
            ValueError: without another text, or with one of fewer tokens, or of more.
        """
        if self.source is None:
            raise ValueError(
                "interchange interventions put hidden states of another text into this one: pass source_ids, and "
                "source_mask (b, s) where rows are padded"
            )
        states, counts = self.source
        own = self.counts()
        wrong = (own > 0) & ((counts == 0) if last else (own != counts))
        if not wrong.is_meta and wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"row {row} has {own[row]} tokens at the positions of an interchange intervention, and the text that "
                f"it takes hidden states from {counts[row]}: choose positions that select as many in both, such as l1"
            )
        return states[self.rows, (counts - 1)[self.rows] if last else self.places]

    def keep(self, name: Any, value: Tensor) -> Tensor:  # (b, ...) -> (b, ...)
        """Return a value of each row, computed once from its prompt and kept while the row is decoded.

        Args:
            name: of the value, for all interventions of the adapter; the intervention itself for its own.
            value: of the rows that have prompt tokens here; others keep what they have.

        """
        before = self.kept.get(name)
        if before is not None:
            here = self.counts(self.prompt) > 0
            value = torch.where(here.view(-1, *[1] * (value.ndim - 1)), value, before.to(value.device))
        self.kept[name] = value
        return value
