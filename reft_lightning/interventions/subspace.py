r"""The low-rank family of the ReFT paper (Wu et al. 2024, arXiv:2404.03592, eq. 2, eq. 3 and Table 17).

==================  ========================================  ===================  ==================
name                Phi(h)                                    paper                pyreft
==================  ========================================  ===================  ==================
loreft              h + R'(W h + b - R h)                     LoReFT, eq. 2        LoreftIntervention
direft              h + W2'(W1 h + b)                         DiReFT, eq. 3        NodireftIntervention
direft_orthonormal  h + R'(W h + b)                           Table 17, row 3      DireftIntervention
noreft              h + W2'(W1 h + b - W2 h)                  Table 17, row 4      NoreftIntervention
consreft            h + R'(b - R h)                           Table 17, row 2      ConsreftIntervention
lobireft            h + R' b                                  Table 17, row 1      LobireftIntervention
==================  ========================================  ===================  ==================

The names are the paper's; pyreft calls the paper's DiReFT ``Nodireft``. Letters: h (n, d) tokens; R, W, W1, W2
(r, d); b (r,). R has orthonormal rows. As in the authors' code, weights are initialised as in ``nn.Linear`` and R
uniformly, so no variant starts at the identity. ``init="identity"`` starts at Phi(h) = h.

``weight_dtype="bfloat16"`` matches the authors' code: W, W1, W2 and b are stored, trained and multiplied in bfloat16,
while R and its products stay in float32. Entries above 2^-7 then cannot move at small learning rates. pyreft keeps the
b of ConsReFT and LobiReFT in float32.

``act_fn="relu"`` applies an activation to W h + b, and nowhere else, as pyreft and AdapterHub do.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..suggest import check_choice
from .base import INTERVENTIONS, Intervention
from .orthonormal import orthonormal_rows, random_rows

WEIGHT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "gelu": F.gelu,
        "gelu_new": partial(F.gelu, approximate="tanh"),
        "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
        "leaky_relu": F.leaky_relu,
        "mish": F.mish,
        "relu": F.relu,
        "relu6": F.relu6,
        "sigmoid": torch.sigmoid,
        "silu": F.silu,
        "swish": F.silu,
        "tanh": torch.tanh,
    }
)
"""Values of ``act_fn``, named as in transformers."""


class Subspace(Intervention):
    """Base class of the family: a rank, an initialisation, and an edit that is a sum of r directions.

    A subclass defines :meth:`build`, ``directions``, and :meth:`coordinates`, the length of an edit along each of them.

    Args:
        dim: width d of the representation.
        rank: r, with 1 <= r <= d.
        init: ``paper`` or ``identity``.
        weight_dtype: dtype of W and b: ``float32``, or ``bfloat16`` as in the authors' code.
        act_fn: a name in :data:`ACTIVATIONS`, the activation on W h + b; None for none, as in the paper.
        **kwargs: dropout and dropout_on, see :class:`Intervention`.

    Raises:
        ValueError: if rank lies outside 1..dim, or the class does not support init, weight_dtype or act_fn.
    """

    def __init__(
        self,
        dim: int,
        rank: int,
        *,
        init: str = "paper",
        weight_dtype: str = "float32",
        act_fn: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, **kwargs)
        if not isinstance(rank, int) or isinstance(rank, bool):
            raise ValueError(f"rank must be a whole number; got {rank!r}")
        if not 1 <= rank <= dim:
            raise ValueError(f"rank must lie in 1..{dim}, the width of the representation; got {rank}")
        check_choice("init", init, ("paper", "identity"))
        check_choice("weight_dtype", weight_dtype, WEIGHT_DTYPES)
        if act_fn is not None:
            check_choice("act_fn", act_fn, ACTIVATIONS)
        self.rank, self.weight_dtype, self.act_fn = rank, weight_dtype, act_fn
        self.build()
        if act_fn is not None and not isinstance(getattr(self, "source", None), nn.Linear):
            raise ValueError(f"{type(self).__name__} has no W h + b for an activation: act_fn must be None")
        if weight_dtype != "float32":
            self._cast_weights(WEIGHT_DTYPES[weight_dtype])
        if init == "identity":
            with torch.no_grad():
                self.make_identity()

    def build(self) -> None:
        """Create the parameters."""
        raise NotImplementedError(f"{type(self).__name__} must define build(), which creates its parameters")

    def _cast_weights(self, dtype: torch.dtype) -> None:
        maps = [child for child in self.children() if isinstance(child, nn.Linear)]
        if not maps:
            raise ValueError(
                f"{type(self).__name__} has no W to keep in {self.weight_dtype}: weight_dtype must be 'float32' (the "
                "authors' code also keeps its b in float32)"
            )
        for linear in maps:
            linear.to(dtype)

    def target(self, h: Tensor) -> Tensor:  # (n, d) -> (n, r)
        """Return W h + b, after the activation if there is one, in the dtype of W."""
        source: Any = self.source
        y = source(h.to(source.weight.dtype))
        return y if self.act_fn is None else ACTIVATIONS[self.act_fn](y)

    def pull(
        self, h: Tensor, rows: Tensor, offset: Tensor | None = None
    ) -> Tensor:  # (n, d), (r, d), (r,) -> (n, r)
        """Return W h + b - (rows h + offset), the distance to the target in the coordinates of ``rows``.

        In bfloat16 each term is rounded before the subtraction, as in the authors' code.
        """
        source: Any = self.source
        if self.act_fn is not None or source.weight.dtype == torch.bfloat16:
            return self.target(h) - F.linear(h.to(rows.dtype), rows, offset)
        return F.linear(h, source.weight - rows, source.bias if offset is None else source.bias - offset)

    def coordinates(self, h: Tensor, rows: Tensor) -> Tensor:  # (n, d), (r, d) -> (n, r)
        """Return how far the edit goes along each of ``rows``, the directions."""
        raise NotImplementedError(f"{type(self).__name__} must define coordinates(h, rows), or edit(h)")

    def edit(self, h: Tensor) -> Tensor:  # (n, d) -> (n, d)
        rows: Any = self.directions
        return self.coordinates(h, rows) @ rows

    def make_identity(self) -> None:
        """Set the parameters so that Phi(h) = h."""
        activated = f" with act_fn={self.act_fn!r}" if self.act_fn else ""
        raise ValueError(
            f"{type(self).__name__}{activated} cannot start at the identity: init must be 'paper'"
        )

    def affine(self) -> tuple[Tensor, Tensor, Tensor]:  # (r, d), (r, d), (r,)
        """Return U, V and c with edit(h) = U'(V h + c), in float64.

        Raises:
            ValueError: if an activation makes the edit non-affine, or values are not finite.
        """
        if self.act_fn is not None:
            raise ValueError(
                f"{type(self).__name__} with act_fn={self.act_fn!r} is not an affine function of h, so no weight can "
                "compute it"
            )
        phi = copy.deepcopy(self).to(torch.float64).requires_grad_(False)
        U: Any = phi.directions
        c = phi.coordinates(U.new_zeros(1, self.dim), U)
        V = phi.coordinates(torch.eye(self.dim, dtype=U.dtype, device=U.device), U) - c  # (d, r)
        if not all(tensor.isfinite().all() for tensor in (U, V, c)):
            raise ValueError(f"{type(self).__name__} has NaN or infinite values: its training diverged")
        return U, V.mT, c[0]

    def extra_repr(self) -> str:
        return f"dim={self.dim}, rank={self.rank}"


class Orthonormal(Subspace):
    """A subspace with orthonormal rows R, stored as the unconstrained parameter ``basis``; see :mod:`.orthonormal`."""

    rotations = ("basis",)

    def build(self) -> None:
        self.basis = nn.Parameter(random_rows(self.rank, self.dim))

    @property
    def R(self) -> Tensor:  # (r, d)
        """The orthonormal rows."""
        return orthonormal_rows(self.basis) if self.lent is None else self.lent

    @property
    def directions(self) -> Tensor:  # (r, d)
        return self.R

    def null(self, h: Tensor) -> Tensor:  # (n, d) -> (n, d)
        """Return -R'R h, which removes from h its component in the row space of R."""
        R = self.R
        return -(h @ R.mT) @ R

    @property
    def lent(self) -> Tensor | None:  # (r, d)
        """R inside :func:`lend`, None outside."""
        return _lent.rows.get(self)


class LoReFT(Orthonormal, name="loreft"):
    r"""Move h, within the row space of R, to the target W h + b.

    .. math:: \Phi(h) = h + R^\top (W h + b - R h), \qquad R R^\top = I_r

    Laws: :math:`R \Phi(h) = W h + b`, and the edit has no component outside the rows of R.
    Source: Wu et al. 2024, arXiv:2404.03592, eq. 2.
    """

    def build(self) -> None:
        super().build()
        self.source = nn.Linear(self.dim, self.rank)  # W, b

    def coordinates(self, h: Tensor, rows: Tensor) -> Tensor:
        return self.pull(h, rows)

    def make_identity(self) -> None:
        if self.act_fn is not None:
            super().make_identity()  # raises
        if self.weight_dtype != "float32":
            raise ValueError(
                f"init='identity' sets W to R, which {self.weight_dtype} cannot hold: use weight_dtype='float32'"
            )
        self.source.weight.copy_(self.R)
        self.source.bias.zero_()


class NoReFT(Subspace, name="noreft"):
    r"""LoReFT without the orthonormality constraint.

    .. math:: \Phi(h) = h + W_2^\top (W_1 h + b - W_2 h)

    Source: Wu et al. 2024, Table 17, row 4.

    Args:
        dim: width d of the representation.
        rank: r, with 1 <= r <= d.
        add_bias: whether W2 h has its own bias b2, as pyreft offers; with an activation, b cannot replace it.
        **kwargs: see :class:`Subspace`.
    """

    def __init__(self, dim: int, rank: int, *, add_bias: bool = False, **kwargs: Any) -> None:
        self.add_bias = add_bias
        super().__init__(dim, rank, **kwargs)

    def build(self) -> None:
        self.source = nn.Linear(self.dim, self.rank)  # W1, b
        self.projection = nn.Linear(self.dim, self.rank, bias=self.add_bias)  # W2, b2

    @property
    def directions(self) -> Tensor:  # (r, d)
        return self.projection.weight

    def coordinates(self, h: Tensor, rows: Tensor) -> Tensor:
        return self.pull(h, rows, self.projection.bias)

    def make_identity(self) -> None:
        if self.act_fn is not None:
            super().make_identity()  # raises
        if self.add_bias:
            self.projection.bias.zero_()
        self.source.weight.copy_(self.projection.weight)
        self.source.bias.zero_()


class DiReFT(Subspace, name="direft"):
    r"""LoRA applied to a hidden representation.

    .. math:: \Phi(h) = h + W_2^\top (W_1 h + b)

    Source: Wu et al. 2024, eq. 3 (``NodireftIntervention`` in pyreft).
    """

    def build(self) -> None:
        self.source = nn.Linear(self.dim, self.rank)  # W1, b
        self.projection = nn.Linear(self.dim, self.rank, bias=False)  # W2

    @property
    def directions(self) -> Tensor:  # (r, d)
        return self.projection.weight

    def coordinates(self, h: Tensor, rows: Tensor) -> Tensor:
        return self.target(h)

    def make_identity(self) -> None:
        self.projection.weight.zero_()


class OrthonormalDiReFT(LoReFT, name="direft_orthonormal"):
    r"""DiReFT with an orthonormal R for W2.

    .. math:: \Phi(h) = h + R^\top (W h + b), \qquad R R^\top = I_r

    Source: Wu et al. 2024, Table 17, row 3 (``DireftIntervention`` in pyreft).
    """

    def coordinates(self, h: Tensor, rows: Tensor) -> Tensor:
        return self.target(h).to(rows.dtype)

    def make_identity(self) -> None:
        if self.act_fn is not None:
            Subspace.make_identity(self)  # raises
        self.source.weight.zero_()
        self.source.bias.zero_()


class ConsReFT(Orthonormal, name="consreft"):
    r"""Set the component of h in the row space of R to a constant.

    .. math:: \Phi(h) = h + R^\top (b - R h), \qquad R R^\top = I_r

    Laws: :math:`R \Phi(h) = b`; idempotent; not the identity for any parameters.
    Source: Wu et al. 2024, Table 17, row 2; b is initialised uniformly in [0, 1), as in pyreft.
    """

    def build(self) -> None:
        super().build()
        self.bias = nn.Parameter(torch.rand(self.rank))

    def coordinates(self, h: Tensor, rows: Tensor) -> Tensor:
        return self.bias - h @ rows.mT


class LobiReFT(Orthonormal, name="lobireft"):
    r"""Add a constant vector in the row space of R.

    .. math:: \Phi(h) = h + R^\top b, \qquad R R^\top = I_r

    Source: Wu et al. 2024, Table 17, row 1; b is initialised uniformly in [0, 1), as in pyreft.
    """

    def build(self) -> None:
        super().build()
        self.bias = nn.Parameter(torch.rand(self.rank))

    def coordinates(self, h: Tensor, rows: Tensor) -> Tensor:
        return self.bias.expand(len(h), -1)

    def make_identity(self) -> None:
        self.bias.zero_()


class Partition(Intervention):
    r"""A subset of the directions of another intervention, sharing its parameters.

    For an edit :math:`U^\top c(h)` with the rows U and the coordinates c, it keeps the rows K:

    .. math:: \Phi_K(h) = h + U_K^\top c(h)_K

    The edits of disjoint partitions add up to the edit of all their rows. In an orthonormal R, later rows are made
    orthogonal to earlier ones, so training the earlier rows turns the later ones.

    Args:
        phi: the other intervention.
        rows: K, distinct numbers in 0..r-1.

    Raises:
        ValueError: if the edit of phi is not such a sum, or it does not have these rows.
    """

    def __init__(self, phi: Intervention, rows: Sequence[int]) -> None:
        super().__init__(phi.dim, dropout=phi.dropout, dropout_on=phi.dropout_on)
        if not isinstance(phi, Subspace) or type(phi).edit is not Subspace.edit:
            divisible = [name for name, cls in INTERVENTIONS.items() if cls.edit is Subspace.edit]
            raise ValueError(
                f"{type(phi).__name__} cannot be partitioned, as its edit is not a sum of directions; these can: "
                f"{', '.join(divisible)}"
            )
        if not rows or len(set(rows)) < len(rows) or not all(0 <= row < phi.rank for row in rows):
            raise ValueError(
                f"rows of a partition must be distinct and in 0..{phi.rank - 1}, as the rank is {phi.rank}; got {rows}"
            )
        self.phi, self.rows = phi, list(rows)

    @property
    def directions(self) -> Tensor:  # (k, d)
        rows: Any = self.phi.directions
        return rows[self.rows]

    def edit(self, h: Tensor) -> Tensor:
        rows: Any = self.phi.directions
        return self.phi.coordinates(h, rows)[:, self.rows] @ rows[self.rows]

    def affine(self) -> tuple[Tensor, Tensor, Tensor]:  # (k, d), (k, d), (k,)
        """Return U, V and c with edit(h) = U'(V h + c); see :meth:`Subspace.affine`."""
        U, V, c = self.phi.affine()
        return U[self.rows], V[self.rows], c[self.rows]

    def extra_repr(self) -> str:
        return f"rows={self.rows}"


def rotations(interventions: Iterable[Intervention]) -> dict[Orthonormal, Tensor]:
    """Compute R for all interventions that have one, with one factorisation per shape; for :func:`lend`."""
    stacks: dict[tuple, list[Orthonormal]] = {}
    for intervention in interventions:
        if isinstance(intervention, Orthonormal):
            basis = intervention.basis
            stacks.setdefault((basis.shape, basis.dtype, basis.device), []).append(intervention)
    shared: dict[Orthonormal, Tensor] = {}
    for stack in stacks.values():
        rows = orthonormal_rows(torch.stack([phi.basis for phi in stack]))
        shared.update(zip(stack, rows.unbind(), strict=True))
    return shared


@contextmanager
def lend(rows: Mapping[Orthonormal, Tensor]) -> Iterator[None]:
    """Let interventions use the R that :func:`rotations` computed, in this thread and inside the block."""
    before, _lent.rows = _lent.rows, {**_lent.rows, **rows}
    try:
        yield
    finally:
        _lent.rows = before


class _Lent(threading.local):
    rows: Mapping[Orthonormal, Tensor] = MappingProxyType({})  # one per thread, as R can carry a graph


_lent = _Lent()
