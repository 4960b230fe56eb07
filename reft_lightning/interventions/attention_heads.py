r"""Edits of the output z of single attention heads: ``component="head_output"``, ``positions="all"``.

=======  ============================================  ==================================================
name     Phi(z)                                        paper
=======  ============================================  ==================================================
lofit    (1 + a) * z, then z + v for the best heads    LoFiT: Yin et al. 2024, arXiv:2406.01563
jola     (1 + g2 a) * z + g1 v, gates g in [0, 1]      JoLA: Lai et al. 2025, arXiv:2502.01179
=======  ============================================  ==================================================

Letters: z (n, d) tokens at a head of width d; a, v (d,), multiplied elementwise. Vectors start at random values near 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..suggest import check_choice
from .base import Intervention

STAGES = ("scale", "bias")
START = 1e-3  # standard deviation in both papers' code
TEMPERATURE, LOW, HIGH, EPSILON = 0.33, -0.1, 1.1, 1e-6  # the gates in JoLA's code


class LoFiT(Intervention, name="lofit"):
    r"""Localized finetuning of attention heads, in two stages. Trains d numbers per head.

    .. math:: \Phi(z) = (1 + a) \odot z \quad \text{(stage scale)}, \qquad \Phi(z) = z + v \quad \text{(stage bias)}

    The first stage trains all heads. The 3 to 10 % of heads with the largest norm of a get a vector v in the second
    stage, which starts from the base model (:func:`reft_lightning.adapters.reft.measuring.longest_heads` finds them).
    Source: Yin et al. 2024, arXiv:2406.01563; penalty and initial values as in its code.

    Args:
        dim: width d of a head.
        stage: ``scale`` or ``bias``.
        l1: weight of the penalty, the sum of absolute values.
        **kwargs: dropout and dropout_on, see :class:`Intervention`.

    Raises:
        ValueError: if stage is unknown.
    """

    def __init__(self, dim: int, stage: str = "bias", l1: float = 0.0, **kwargs: Any) -> None:
        super().__init__(dim, **kwargs)
        check_choice("stage", stage, STAGES)
        self.stage, self.l1 = stage, l1
        self.vector = nn.Parameter(START * torch.randn(dim))

    @property
    def directions(self) -> Tensor | None:  # (1, d)
        return self.vector.unsqueeze(0) if self.stage == "bias" else None

    def edit(self, h: Tensor) -> Tensor:  # (n, d) -> (n, d)
        """Return a * z, or v for every token."""
        return self.vector * h if self.stage == "scale" else self.vector.expand_as(h)

    def penalty(self) -> Tensor | None:
        """Return the weighted L1 norm of a or v."""
        return self.l1 * self.vector.abs().sum() if self.l1 else None


class JoLA(Intervention, name="jola"):
    r"""Joint localization and activation editing: scale and shift a head's output, as far as its gates are open.

    .. math:: \Phi(z) = (1 + g_2 a) \odot z + g_1 v, \qquad g = \min(1, \max(0, s (\zeta - \gamma) + \gamma))

    with :math:`s = \sigma(\ell)` for trained :math:`\ell`, and in training :math:`s = \sigma((\log u - \log(1 - u) +
    \ell) / T)` with u uniform: HardConcrete gates (Louizos et al. 2018, arXiv:1712.01312) with T = 0.33,
    :math:`\gamma = -0.1, \zeta = 1.1`. The penalty is ``l0`` times the probability that a gate is open,
    :math:`\sigma(\ell - T \log(-\gamma/\zeta))`, summed over both gates and all heads. Trains 2 d + 2 numbers per head.
    Source: Lai et al. 2025, arXiv:2502.01179; constants and initial values as in its code, which instead weights the
    two gates' penalties by w and 1 - w and averages over heads.

    Args:
        dim: width d of a head.
        l0: weight of the penalty; the authors' code uses 4e-5.
        **kwargs: dropout and dropout_on, see :class:`Intervention`.
    """

    def __init__(self, dim: int, l0: float = 4e-5, **kwargs: Any) -> None:
        super().__init__(dim, **kwargs)
        self.l0 = l0
        self.scaling = nn.Parameter(START * torch.randn(dim))  # a
        self.bias = nn.Parameter(START * torch.randn(dim))  # v
        self.gates = nn.Parameter(torch.empty(2).uniform_(-0.4, 0.4))  # l of g1 and g2; Xavier's for 32 heads

    def open(self) -> Tensor:  # () -> (2,)
        """Return g1 and g2, which are sampled in training."""
        if self.training:
            u = EPSILON + (1 - 2 * EPSILON) * torch.rand_like(self.gates)
            s = torch.sigmoid((u.log() - (1 - u).log() + self.gates) / TEMPERATURE)
        else:
            s = torch.sigmoid(self.gates)
        return (s * (HIGH - LOW) + LOW).clamp(0, 1)

    def edit(self, h: Tensor) -> Tensor:  # (n, d) -> (n, d)
        """Return g2 a * z + g1 v."""
        move, scale = self.open()
        return scale * self.scaling * h + move * self.bias

    def penalty(self) -> Tensor:
        """Return the weighted expected number of open gates."""
        return self.l0 * torch.sigmoid(self.gates - TEMPERATURE * math.log(-LOW / HIGH)).sum()
