r"""Principal angles between subspaces.

For orthonormal rows P (k, d) and Q (m, d) the cosines of the principal angles are the singular values of :math:`P Q^T`
(Björck and Golub 1973). Random subspaces of many dimensions are nearly orthogonal: read an angle against what chance
gives, :math:`E[\cos^2] = \max(k, m) / d`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def principal_angles(P: Tensor, Q: Tensor) -> Tensor:  # (k, d), (m, d) -> (min(k, m),)
    """Return the principal angles of two row spaces in degrees, the smallest first; rows are orthonormal."""
    if P.shape[1] != Q.shape[1]:
        raise ValueError(
            f"subspaces of spaces of {P.shape[1]} and {Q.shape[1]} dimensions have no angle: the adapters edit "
            "representations of different widths"
        )
    return torch.linalg.svdvals(P @ Q.mT).clamp(max=1).arccos().rad2deg()


def mean_angle(P: Tensor, Q: Tensor) -> float:
    """Return one angle for two subspaces: that whose squared cosine is the mean over the principal angles."""
    return _of_mean_square(float(principal_angles(P, Q).deg2rad().cos().square().mean()))


def chance_angle(P: Tensor, Q: Tensor) -> float:
    """Return the same for two random subspaces of these dimensions, in expectation of the squared cosine."""
    return _of_mean_square(max(P.shape[0], Q.shape[0]) / P.shape[1])


def _of_mean_square(mean: float) -> float:
    return math.degrees(math.acos(math.sqrt(min(mean, 1.0))))


def between(spaces: Sequence[Tensor]) -> list[list[float]]:
    """Return the mean angle of each subspace with each."""
    return [[mean_angle(P, Q) for Q in spaces] for P in spaces]
