r"""R: r orthonormal rows in R^d, from an unconstrained (r, d) parameter A, for all layers in one batched call.

With the Cholesky factorisation :math:`A A^\top = L L^\top` (an r x r matrix), :math:`R = L^{-1} A` has
orthonormal rows that span the rows of A, and R = A where A is orthonormal already. This is the Q of a thin QR
of A with positive diagonal. One pass loses digits with the square of A's condition number, so a second pass
follows ("CholeskyQR2", Yamamoto et al. 2015), which leaves :math:`\|R R^\top - I\|` at rounding error.

The cost is O(r^2 d) per layer. ``torch.nn.utils.parametrizations.orthogonal`` costs O(r d^2) and a d x d buffer
per intervention, and any weight decay on its parameter sets R to 0 at the first step; here decay only shrinks A,
and R does not depend on the scale of A.

Shapes: r rank, d width, ``...`` any batch of layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import without_autocast


def orthonormal_rows(A: Tensor) -> Tensor:  # (..., r, d) -> (..., r, d)
    r"""Return R with :math:`R R^\top = I_r` and the row space of A, a continuous function of A.

    Args:
        A: (..., r, d) with r <= d and full row rank.

    Returns:
        R, of the same shape, in float32 or higher precision.

    Raises:
        torch.linalg.LinAlgError: if the rows of some A are linearly dependent.
    """
    with without_autocast(A.device.type):  # in bfloat16, R R' = I would hold to only two digits
        A = A.to(torch.promote_types(A.dtype, torch.float32))
        A = A / A.norm(dim=-1, keepdim=True).mean(dim=-2, keepdim=True)  # R does not depend on the scale of A
        rows, _, failed = _cholesky_pass(A)
        R, L, failed_again = _cholesky_pass(rows)
        # after a successful first pass, L is close to I; dependent rows leave rounding noise of arbitrary small norm
        independent = (L.diagonal(dim1=-2, dim2=-1) > 0.1).all() & ~(failed | failed_again).any()
        if not A.is_meta and not independent:
            message = "the rows of a matrix are linearly dependent or not finite"
            raise torch.linalg.LinAlgError(message)  # pyright: ignore[reportPrivateImportUsage]
        return R


def _cholesky_pass(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # -> (..., r, d), (..., r, r), (...)
    L, info = torch.linalg.cholesky_ex(A @ A.mT)
    return torch.linalg.solve_triangular(L, A, upper=False), L, info.bool()


def random_rows(rank: int, dim: int) -> Tensor:  # () -> (r, d)
    """Draw A with r orthogonal rows of length 1/2, whose directions are uniform in R^d.

    R does not depend on the length, but the shorter A is, the farther a step turns R. At 1/2, a step of Adam
    turns R as far as it does under torch's orthogonal map, for which the paper's learning rates were tuned.
    A is half the Q of a Gaussian matrix's QR, with the signs of R's diagonal, as in ``nn.init.orthogonal_``.
    """
    gaussian = torch.randn(rank, dim)
    if gaussian.is_meta:  # parameters are only counted
        return gaussian
    packed, scales = torch.geqrf(gaussian.mT)  # torch.linalg.qr takes four times as long at this shape
    signs = packed.diagonal(dim1=-2, dim2=-1).sign()
    return (0.5 * torch.linalg.householder_product(packed, scales) * signs).mT.contiguous()
