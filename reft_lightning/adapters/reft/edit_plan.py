"""What one call of the base model edits: the selected tokens of every site.

Shapes: b rows, s columns, n selected tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .positions import Positions


@dataclass
class EditPlan:
    """What the hooks do during one call of the base model: flat token indices for every site."""

    edits: dict[str, list[Tensor]]  # site -> one index (n,) for each of its interventions
    tokens: Tensor  # (b, s) or (b, s, d), what the call reads; sizes in numbers would be constants to torch.compile
    differentiable: bool  # whether the call records gradients


def token_indices(
    positions: Positions, tied: str, prompt: Tensor, target: Tensor, columns: slice
) -> list[Tensor]:
    """Return one flat token index (n,) for each intervention of a site, in the columns that are read."""
    groups = [slots[:, columns].flatten() for slots in positions.select(prompt, target)]
    if tied == "all":
        return [(torch.stack(groups) >= 0).any(0).nonzero().squeeze(-1)]
    if tied == "group":
        return [(slots >= 0).nonzero().squeeze(-1) for slots in groups]
    counts = positions.slots()
    return [(s == k).nonzero().squeeze(-1) for s, n in zip(groups, counts, strict=True) for k in range(n)]
