r"""Principal angles between subspaces.

For orthonormal rows P (k, d) and Q (m, d) the cosines of the principal angles are the singular values of :math:`P Q^T`
(Björck and Golub 1973). Random subspaces of high-dimensional spaces are nearly orthogonal: compare an angle with the
one expected by chance, :math:`E[\cos^2] = \max(k, m) / d`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def principal_angles(P: Tensor, Q: Tensor) -> Tensor:  # (k, d), (m, d) -> (min(k, m),)
    """Return the principal angles of two row spaces in degrees, smallest first; rows must be orthonormal."""
    if P.shape[1] != Q.shape[1]:
        raise ValueError(f"subspaces must have the same width; got {P.shape[1]} and {Q.shape[1]}")
    return torch.linalg.svdvals(P @ Q.mT).clamp(max=1).arccos().rad2deg()


def mean_angle(P: Tensor, Q: Tensor) -> float:
    """Return one angle for two subspaces: its squared cosine is the mean over the principal angles."""
    return _of_mean_square(float(principal_angles(P, Q).deg2rad().cos().square().mean()))


def chance_angle(P: Tensor, Q: Tensor) -> float:
    """Return this angle for two random subspaces of these dimensions, from the expected squared cosine."""
    return _of_mean_square(max(P.shape[0], Q.shape[0]) / P.shape[1])


def _of_mean_square(mean: float) -> float:
    return math.degrees(math.acos(math.sqrt(min(mean, 1.0))))


def between(spaces: Sequence[Tensor], angle: Callable[[Tensor, Tensor], float]) -> list[list[float]]:
    """Return the angle between each pair of subspaces; NaN if their widths differ."""
    return [[angle(P, Q) if P.shape[1] == Q.shape[1] else math.nan for Q in spaces] for P in spaces]


def spread(angles: Iterable[float]) -> str:
    """Return degrees as one number if all are equal, else as a range.

    >>> spread([83.21, 83.22]), spread([83.2, 79.3])
    ('83.2', '79.3 to 83.2')
    """
    shown = sorted(round(angle, 1) for angle in angles)
    return " to ".join(f"{angle:.1f}" for angle in dict.fromkeys((shown[0], shown[-1])))
