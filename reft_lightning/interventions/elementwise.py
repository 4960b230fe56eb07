r"""Elementwise edits of a representation: no subspace, no rank.

==================  ======================================  ====================================================
name                Phi(h)                                  paper
==================  ======================================  ====================================================
red                 s * h + b                               RED: Wu et al. 2024, arXiv:2402.15179, eq. 3
bias                h + b                                   a trained steering vector; RED without its scaling
activation_scaling  (1 + a) h, a one number                 Stoehr et al. 2024, arXiv:2410.04962
==================  ======================================  ====================================================

Letters: h (n, d) tokens; s, b (d,), multiplied elementwise. All start at the identity: s = 1, b = 0, a = 0.
RED edits every token after the feed-forward module of every layer: ``component="mlp_output"``, ``positions="all"``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Intervention


class Bias(Intervention, name="bias"):
    r"""Add a vector: :math:`\Phi(h) = h + b`. Trains d numbers.

    Args:
        dim: width d of the representation.
        **kwargs: dropout and dropout_on, see :class:`Intervention`.
    """

    def __init__(self, dim: int, **kwargs: Any) -> None:
        super().__init__(dim, **kwargs)
        self.bias = nn.Parameter(torch.zeros(dim))

    @property
    def directions(self) -> Tensor | None:  # (1, d)
        return self.bias.unsqueeze(0)

    def edit(self, h: Tensor) -> Tensor:  # (n, d) -> (n, d)
        """Return b for every token."""
        return self.bias.expand_as(h)

    def null(self, h: Tensor) -> Tensor:  # (n, d) -> (n, d)
        r"""Return :math:`-\text{ReLU}(b^T h) b / \|b\|^2`: Wu et al. 2025, arXiv:2505.20809."""
        along = (h @ self.bias).relu() / self.bias.square().sum().clamp(min=torch.finfo(h.dtype).tiny)
        return -along.unsqueeze(-1) * self.bias


class RED(Bias, name="red"):
    r"""Scale each number and add a vector: :math:`\Phi(h) = s \odot h + b`. Trains 2 d numbers.

    Args:
        dim: width d of the representation.
        restraint: weight of the penalty, the norm of b; BREP (Liang et al. 2025, arXiv:2511.10707) keeps it near a
            target (``callbacks=penalty_pid``).
        **kwargs: dropout and dropout_on, see :class:`Intervention`.
    """

    def __init__(self, dim: int, restraint: float = 0.0, **kwargs: Any) -> None:
        super().__init__(dim, **kwargs)
        self.restraint = restraint
        self.scaling = nn.Parameter(torch.ones(dim))

    @property
    def directions(self) -> None:
        return None

    null = Intervention.null  # a scaling has no direction to remove

    def edit(self, h: Tensor) -> Tensor:  # (n, d) -> (n, d)
        """Return (s - 1) * h + b."""
        return (self.scaling - 1) * h + self.bias

    def penalty(self) -> Tensor | None:
        """Return the weighted norm of b."""
        return self.restraint * torch.linalg.vector_norm(self.bias) if self.restraint else None


class ActivationScaling(Intervention, name="activation_scaling"):
    r"""Scale a whole hidden state: :math:`\Phi(h) = (1 + a) h`. Trains one number.

    A sparse set of scalars shows which sites and tokens matter: one per position (``tied=position``), block and module,
    with an L1 penalty. Source: Stoehr et al. 2024, arXiv:2410.04962.

    Args:
        dim: width d of the representation.
        l1: weight of the penalty, the absolute value of a.
        **kwargs: dropout and dropout_on, see :class:`Intervention`.
    """

    def __init__(self, dim: int, l1: float = 0.0, **kwargs: Any) -> None:
        super().__init__(dim, **kwargs)
        self.l1 = l1
        self.scalar = nn.Parameter(torch.zeros(1))  # a

    def edit(self, h: Tensor) -> Tensor:  # (n, d) -> (n, d)
        """Return a h."""
        return self.scalar * h

    def penalty(self) -> Tensor | None:
        """Return the weighted absolute value of a."""
        return self.l1 * self.scalar.abs().sum() if self.l1 else None
