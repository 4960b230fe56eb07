r"""Principal angles between subspaces.

For orthonormal rows P (k, d) and Q (m, d) the cosines of the principal angles are the singular values of :math:`P Q^T`
(Björck and Golub 1973). Random subspaces of many dimensions are nearly orthogonal: read an angle against what chance
gives, :math:`E[\cos^2] = \max(k, m) / d`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def principal_angles(P: Tensor, Q: Tensor) -> Tensor:  # (k, d), (m, d) -> (min(k, m),)
    """Return the principal angles of two row spaces in degrees, the smallest first; rows are orthonormal."""
    if P.shape[1] != Q.shape[1]:
        raise ValueError(f"subspaces of spaces of {P.shape[1]} and {Q.shape[1]} dimensions have no angle")
    return torch.linalg.svdvals(P @ Q.mT).clamp(max=1).arccos().rad2deg()


def mean_angle(P: Tensor, Q: Tensor) -> float:
    """Return one angle for two subspaces: that whose squared cosine is the mean over the principal angles."""
    return _of_mean_square(float(principal_angles(P, Q).deg2rad().cos().square().mean()))


def chance_angle(P: Tensor, Q: Tensor) -> float:
    """Return the same for two random subspaces of these dimensions, in expectation of the squared cosine."""
    return _of_mean_square(max(P.shape[0], Q.shape[0]) / P.shape[1])


def _of_mean_square(mean: float) -> float:
    return math.degrees(math.acos(math.sqrt(min(mean, 1.0))))


def between(spaces: Sequence[Tensor], angle: Callable[[Tensor, Tensor], float]) -> list[list[float]]:
    """Return an angle of each subspace with each; NaN for those of different widths, which have none."""
    return [[angle(P, Q) if P.shape[1] == Q.shape[1] else math.nan for Q in spaces] for P in spaces]


def spread(angles: Iterable[float]) -> str:
    """Return degrees as one number where all are the same, else from the least to the largest.

    >>> spread([83.21, 83.22]), spread([83.2, 79.3])
    ('83.2', '79.3 to 83.2')
    """
    shown = sorted(round(angle, 1) for angle in angles)
    return " to ".join(f"{angle:.1f}" for angle in dict.fromkeys((shown[0], shown[-1])))
