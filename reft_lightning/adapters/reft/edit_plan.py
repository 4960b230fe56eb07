"""What one call of the base model edits: the selected tokens of every site.

Shapes: b rows, s columns, n selected tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..masks import Spans
from .positions import Positions, spread


class Choice(NamedTuple):
    """An adapter that a call uses."""

    adapter: str
    weight: float = 1.0  # times its scale
    rows: Tensor | None = None  # (b,) bool, those it edits; None for all


class Edit(NamedTuple):
    """What one adapter does at one site."""

    adapter: str
    layer: str
    weight: float
    indices: list[Tensor]  # (n,) flat token indices for each of its interventions


@dataclass
class EditPlan:
    """What the hooks do during one call of the base model."""

    edits: dict[str, list[Edit]]  # site -> one after the other, or added up
    summed: bool  # whether the edits at a site are those of one and the same hidden state
    tokens: Tensor  # (b, s) or (b, s, d), what the call reads; sizes in numbers would be constants to torch.compile
    differentiable: bool  # whether the call records gradients
    spans: Spans  # prompt and target of what is read
    prompt: Tensor | None = None  # (b s,) bool, the tokens of prompts, where an intervention sees rows

    @property
    def edits_anything(self) -> bool:
        """Whether any token is selected."""
        return any(index.numel() for edits in self.edits.values() for edit in edits for index in edit.indices)


def token_indices(
    positions: Positions,
    tied: str,
    prompt: Tensor,
    target: Tensor,
    columns: slice,
    marks: Mapping[str, Tensor],
) -> list[Tensor]:
    """Return one flat token index (n,) for each intervention of a site, in the columns that are read."""
    groups = [slots[:, columns].flatten() for slots in positions.select(prompt, target, marks)]
    if tied == "all":
        return [(torch.stack(groups) >= 0).any(0).nonzero().squeeze(-1)]
    if tied == "group":
        return [(slots >= 0).nonzero().squeeze(-1) for slots in groups]
    counts = positions.slots()
    return [(s == k).nonzero().squeeze(-1) for s, n in zip(groups, counts, strict=True) for k in range(n)]


def image_indices(
    positions: Positions, hidden: Tensor, where: str
) -> list[Tensor]:  # (images, n, d) or (n, d)
    """Return the flat token indices that the one intervention of a site in a vision tower edits.

    Raises:
        ValueError: for a share of the tokens of each image, where those of all images stand in one list.
    """
    share = positions.share_of_images
    if share is not None and hidden.ndim != 3:
        raise ValueError(
            f"{where} has the tokens of all images in one list, so a share of them would not be one of each image: "
            "write positions=image there, or image:S in the language model"
        )
    every = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
    return [(spread(every, share) >= 0).flatten().nonzero().squeeze(-1)]
