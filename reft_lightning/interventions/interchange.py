r"""Interchange interventions replace a subspace of h with that of another text, the source. ReFT grew out of them.

=============  ===============================================  =====================================================
name           Phi(h)                                           paper
=============  ===============================================  =====================================================
das            h + R'(R s - R h)                                DAS: Geiger et al. 2023, arXiv:2303.02536
boundless_das  h + R'(m * (R s - R h)), m = mask of directions  Boundless DAS: Wu et al. 2023, arXiv:2305.08809
cdas           h + R'(R s' - R h), s' the last of the prompt    Concept DAS: Bao et al. 2026, arXiv:2602.05234
=============  ===============================================  =====================================================

Letters: h (n, d) tokens, s (n, d) the source's hidden states in the same places, R (r, d) with orthonormal rows. If the
model then answers as if a causal variable had the source's value, the subspace encodes that variable. The share of such
answers is the interchange intervention accuracy (IIA).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Intervention
from .rows import Found, Tokens
from .subspace import Orthonormal

START, END = 50.0, 0.1  # temperatures in pyvene's training
FASTER = 10  # pyvene's learning rate of the boundary over that of R


class DAS(Orthonormal, name="das"):
    r"""Distributed alignment search: give h, within the row space of R, the coordinates of the source.

    .. math:: \Phi(h) = h + R^\top (R s - R h), \qquad R R^\top = I_r

    Laws: :math:`R \Phi(h) = R s`; :math:`\Phi(h) = h` if s = h; :math:`\Phi(h) = s` if r = d. Trains r d numbers. The
    latents are R h. Source: Geiger et al. 2023, arXiv:2303.02536.
    """

    takes_source = "same"
    edit = Intervention.edit  # without a source it is not a sum of directions that could be divided

    def mask(self) -> Tensor | float:  # () -> (r,)
        """Return the share of each coordinate that is exchanged."""
        return 1.0

    def edit_rows(self, h: Tensor, tokens: Tokens) -> Found:
        """Return the edit and the coordinates."""
        R = self.R
        own = h @ R.mT
        theirs = tokens.of_source(last=self.takes_source == "last").to(h) @ R.mT
        return Found(self.mask() * (theirs - own) @ R, latents=own)


class BoundlessDAS(DAS, name="boundless_das"):
    r"""DAS that learns how many directions to exchange: a mask over the rows of R that sharpens in training.

    .. math:: \Phi(h) = h + R^\top (m \odot (R s - R h)), \qquad
        m_i = \sigma\Big(\frac{i}{T}\Big)\, \sigma\Big(\frac{\beta r - i}{T}\Big), \quad i = 0, ..., r - 1

    The boundary :math:`\beta` starts at 1/2 and is clamped to 0.001..1. The temperature T falls linearly over the
    training steps (``objective=interchange``), and is ``end`` in evaluation. The penalty is ``sparsity``
    times :math:`\beta`. Trains r d + 1 numbers. Source: Wu et al. 2023, arXiv:2305.08809; numbers as in pyvene's
    tutorial, whose T counts as a trained parameter but is overwritten, and whose :math:`\beta` has ten times the
    learning rate of R: here :math:`\beta` is ten times its parameter, which is equivalent under Adam. As there, m of
    the first direction is at most 1/2. T is in units of directions, and 50 was chosen for a width of 4,096: try a
    hundredth of the width. The rows of a full rotation become dependent at learning rates that low-rank subspaces
    tolerate (0.005 in ``experiments/interchange``).

    Args:
        dim: width d of the representation.
        rank: r; None for d, as in the paper.
        sparsity: weight of the penalty.
        start: T at the first step.
        end: T at the last step.
        **kwargs: dropout and dropout_on, see :class:`Intervention`.

    Raises:
        ValueError: if a temperature is not above 0.
    """

    def __init__(
        self,
        dim: int,
        rank: int | None = None,
        *,
        sparsity: float = 1.0,
        start: float = START,
        end: float = END,
        **kwargs: Any,
    ) -> None:
        if not start > 0 or not end > 0:
            raise ValueError(f"the temperatures start and end must be above 0; got {start} and {end}")
        super().__init__(dim, dim if rank is None else rank, **kwargs)
        self.sparsity, self.start, self.end = sparsity, start, end
        self.boundary = nn.Parameter(torch.tensor([0.5 / FASTER]))

    def edge(self) -> Tensor:  # () -> (1,)
        """Return the boundary, clamped to 0.001..1."""
        return (FASTER * self.boundary).clamp(1e-3, 1)

    def mask(self) -> Tensor:  # () -> (r,)
        """Return m."""
        T = self.start + (self.end - self.start) * (self.annealed if self.training else 1.0)
        i = torch.arange(self.rank, device=self.boundary.device, dtype=self.boundary.dtype)
        return torch.sigmoid(i / T) * torch.sigmoid((self.edge() * self.rank - i) / T)

    def penalty(self) -> Tensor:
        """Return the weighted boundary; above 1 it is still pulled back, below 0.001 it has no gradient."""
        return self.sparsity * (FASTER * self.boundary).clamp(min=1e-3).sum()


class CDAS(DAS, name="cdas"):
    r"""Concept DAS: every token takes the coordinates of the last token of the source's prompt.

    .. math:: \Phi(h) = h + R^\top (R s' - R h)

    Trained to match the source's distributions, in both directions (``objective=cdas``). The paper uses rank 1 at all
    tokens, to steer. Without a source the coordinates can be chosen: ConsReFT is the same formula with b for R s'.
    Source: Bao et al. 2026, arXiv:2602.05234, and its code.
    """

    takes_source = "last"

    def __init__(self, dim: int, rank: int = 1, **kwargs: Any) -> None:
        super().__init__(dim, rank, **kwargs)
