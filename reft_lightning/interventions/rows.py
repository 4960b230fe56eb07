"""The other inputs and outputs of an edit, besides h and the edit itself.

Most interventions are functions of single tokens. One that reads the whole prompt (a gate, the largest activations of
a row) or values the caller passes for each row (a concept), or that returns more than hidden states, defines
``edit_rows``:

    class Gated(rl.Intervention, name="gated"):
        def edit_rows(self, h, tokens):
            gate = tokens.keep(self, tokens.mean_of_prompts(h @ self.condition) > 0)  # (b,), once per prompt
            return gate[tokens.rows, None] * self.bias

Shapes: b rows, n selected tokens of all rows in order, m selected tokens in the longest row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Found(NamedTuple):
    """An edit, with its penalty and latents.

    Args:
        edit: (n, d), the difference Phi(h) - h at scale 1.
        penalty: a scalar to add to the training loss, or None.
        latents: (n, k), the features the intervention detects in its tokens, or None.
    """

    edit: Tensor
    penalty: Tensor | None = None
    latents: Tensor | None = None


@dataclass
class Tokens:
    """The rows that the n tokens of one edit belong to, and what is known about those rows.

    Args:
        rows: (n,), the row of the batch each token belongs to, in ascending order.
        count: b.
        prompt: (n,) bool, whether a token belongs to its row's prompt.
        kept: values that one adapter's interventions computed from the prompts of a call; see :meth:`keep`.
        given: name -> (b, ...), values the caller passes for each row (the model's ``row_values``).
        source: (b, m, d) and (b,), the hidden states of another text at the intervention's positions, and how many
            of them each row has; None if there is no other text (the model's ``source_ids``).
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
        """Return n tokens that form a single prompt."""
        n, device = len(h), h.device
        return cls(
            torch.zeros(n, dtype=torch.long, device=device), 1, torch.ones(n, dtype=torch.bool, device=device)
        )

    def counts(self, chosen: Tensor | None = None) -> Tensor:  # (n,) bool -> (b,)
        """Return the number of tokens in each row, or of its chosen tokens."""
        ones = torch.ones_like(self.rows) if chosen is None else chosen.long()
        return torch.zeros(self.count, dtype=torch.long, device=ones.device).index_add(0, self.rows, ones)

    def sums(self, x: Tensor) -> Tensor:  # (n, ...) -> (b, ...)
        """Return the sum over the tokens of each row."""
        return x.new_zeros(self.count, *x.shape[1:]).index_add(0, self.rows, x)

    def mean_of_prompts(self, x: Tensor) -> Tensor:  # (n, ...) -> (b, ...)
        """Return the mean over each row's prompt tokens; 0 for a row without any."""
        weights = self.prompt.to(x.dtype) / self.counts(self.prompt).clamp(min=1)[self.rows]
        return self.sums(x * weights.view(-1, *[1] * (x.ndim - 1)))

    @property
    def places(self) -> Tensor:  # (n,)
        """For each token, the number of tokens before it in its row."""
        counts = self.counts()
        return torch.arange(len(self.rows), device=counts.device) - (counts.cumsum(0) - counts)[self.rows]

    def padded(self, x: Tensor, value: float = 0.0) -> Tensor:  # (n, ...) -> (b, m, ...)
        """Return x with one row per row of the batch, padded with ``value``."""
        width = len(x) if x.is_meta or not len(x) else int(self.counts().max())  # on meta at most n
        return x.new_full((self.count, width, *x.shape[1:]), value).index_put((self.rows, self.places), x)

    def of_source(self, last: bool = False) -> Tensor:  # () -> (n, d)
        """Return the hidden state each token takes from the other text: that of the token in its place, or of the last.

        Raises:
            ValueError: if there is no other text, or its row has a different number of tokens at the positions.
        """
        if self.source is None:
            raise ValueError(
                "interchange interventions take hidden states from another text: pass source_ids, and source_mask "
                "(b, s) if rows are padded"
            )
        states, counts = self.source
        own = self.counts()
        wrong = (own > 0) & ((counts == 0) if last else (own != counts))
        if not wrong.is_meta and wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"row {row} has {own[row]} tokens at the positions of an interchange intervention, but its source text "
                f"has {counts[row]}: choose positions that select equally many in both, such as l1"
            )
        return states[self.rows, (counts - 1)[self.rows] if last else self.places]

    def keep(self, name: Any, value: Tensor) -> Tensor:  # (b, ...) -> (b, ...)
        """Return a per-row value that is computed once from the prompt and kept while the row is decoded.

        Args:
            name: a key shared by all interventions of the adapter; for a private value, the intervention itself.
            value: the new value; rows without prompt tokens in this call keep their earlier one.
        """
        before = self.kept.get(name)
        if before is not None:
            here = self.counts(self.prompt) > 0
            value = torch.where(here.view(-1, *[1] * (value.ndim - 1)), value, before.to(value.device))
        self.kept[name] = value
        return value
