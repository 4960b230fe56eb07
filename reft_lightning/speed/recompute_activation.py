r"""Gated feed-forward parts remember one tensor less for the backward pass.

.. math:: y = W_{down}\,(\phi(g) \odot u), \quad g = W_{gate}\,x, \quad u = W_{up}\,x

(SwiGLU, GeGLU: Shazeer 2020, arXiv:2002.05202). The backward pass of the product reads phi(g) and u, that of phi
reads g. phi(g) is computed from g again, by the same function: the same bits, and of three tensors (b, s, d_ff) two are
kept.

Shapes: b rows, s columns, d_ff width inside the part.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..base_models.patching import replaced
from .agreement import Run

# whose backward pass reads what went in; ReLU's reads what came out
ACTIVATIONS = ("SiLU", "SiLUActivation", "GELU", "GELUActivation", "GELUTanh")

# whether somebody else decides what is remembered; torch has no public way to ask
_others_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


class RecomputedActivations:
    """A training pass whose gated parts compute phi(g) again.

    Args:
        parts: each gated module and its phi.
        run: the pass.
    """

    def __init__(self, parts: list[tuple[nn.Module, nn.Module]], run: Run) -> None:
        self.parts, self.run = parts, run

    def __call__(self, inputs: Mapping[str, Any], rows: Sequence[int], boundary: int | None = None) -> Any:
        """Return what the pass returns."""
        lean = [(part, "forward", partial(_lean, part.forward, phi)) for part, phi in self.parts]
        with replaced(lean):
            return self.run(inputs, rows, boundary)


def recompute_activations(model: Any, run: Run) -> Run:
    """Return the training pass with gated parts that remember less, or ``run`` itself where there are none.

    To be called where the model is trained. Compiled passes, gradient checkpointing and ``save_on_cpu`` go on
    deciding themselves what they remember.

    Args:
        model: a :class:`ReftModel` or a baseline.
        run: the pass.
    """
    parts = list(_gated(model.base_model))
    return RecomputedActivations(parts, run) if parts else run


def _gated(base: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield each module with an activation and the linear maps d -> f, d -> f and f -> d, and the activation."""
    for module in base.modules():
        children = list(module.children())
        # peft's are no nn.Linear, but say their widths
        maps = [
            child for child in children if hasattr(child, "in_features") and hasattr(child, "out_features")
        ]
        widths = [(child.in_features, child.out_features) for child in maps]
        phis = [child for child in children if type(child).__name__ in ACTIVATIONS]
        if len(widths) == 3 and len(phis) == 1:
            (d, f), *others = sorted(widths, key=widths.count, reverse=True)
            if others == [(d, f), (f, d)]:
                yield module, phis[0]


def _lean(forward: Callable[..., Any], phi: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a gated part; what it would remember of phi's output is computed again when it is needed."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    if _others_hooks is None or _others_hooks(False) is not None:
        return forward(*args, **kwargs)
    plain = phi.forward
    made: list[tuple[weakref.ref[Tensor], tuple[Any, ...], _Again]] = []

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        output = plain(*args, **kwargs)
        # a gate without gradient is not remembered for phi; one that phi changed in place is gone; tensors made of
        # others (tensor parallelism) have no place of their own: 0
        if output.requires_grad and len(args) == 1 and not kwargs and output.data_ptr() != args[0].data_ptr():
            made.append((weakref.ref(output), _identity(output), _Again(plain, _Saved(args[0]))))
        return output

    def pack(tensor: Tensor) -> _Saved | _Again:
        for output, identity, again in made:
            # while it lives its place is its own; held here, it would leave a hole among what is remembered
            if output() is not None and _identity(tensor) == identity:
                return again
        return _Saved(tensor)

    with replaced([(phi, "forward", noted)]), saved_tensors_hooks(pack, lambda saved: saved()):
        return forward(*args, **kwargs)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor._version


class _Saved:
    """A tensor for the backward pass, as it is now: without its graph, which would hold it and never be freed."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor.detach(), tensor._version

    def __call__(self) -> Tensor:
        if self.tensor._version != self.version:  # torch checks this only of tensors without hooks
            raise RuntimeError(
                f"a tensor {tuple(self.tensor.shape)} of a feed-forward part was changed in place before its gradient "
                "was computed: change a copy"
            )
        return self.tensor


class _Again:
    """phi(g), computed when it is called."""

    def __init__(self, phi: Callable[[Tensor], Tensor], gate: _Saved) -> None:
        self.phi, self.gate = phi, gate

    def __call__(self) -> Tensor:
        return self.phi(self.gate())
