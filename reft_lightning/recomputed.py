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

from .replaced import replaced, runs_blocks_again

# whose backward pass reads what went in; ReLU's reads what came out
ACTIVATIONS = ("SiLU", "SiLUActivation", "GELU", "GELUActivation", "GELUTanh")

Run = Callable[[Mapping[str, Any], Sequence[int], int | None], Any]


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


def recompute_activations(model: Any, run: Run | None) -> Run | None:
    """Return the training pass with gated parts that remember less, or ``run`` itself where there are none.

    To be called where the model is trained, uncompiled. Gradient checkpointing remembers less already.

    Args:
        model: a :class:`ReftModel` or a baseline.
        run: the pass; None: the model's own.
    """
    parts = [] if runs_blocks_again(model.base_model) else list(_gated(model.base_model))
    if not parts:
        return run
    return RecomputedActivations(parts, run or (lambda inputs, rows, boundary: model(**inputs)))


def _gated(base: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield each module with an activation and at least three linear maps of its own, and the activation."""
    for module in base.modules():
        children = list(module.children())
        if sum(hasattr(child, "in_features") for child in children) >= 3:  # peft's are no nn.Linear
            yield from ((module, child) for child in children if type(child).__name__ in ACTIVATIONS)


def _lean(forward: Callable[..., Any], phi: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a gated part; what it would remember of phi's output is computed again when it is needed."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    plain = phi.forward
    made: list[tuple[weakref.ref[Tensor], int, Tensor]] = []

    def noted(gate: Tensor) -> Tensor:
        output = plain(gate)
        made.append((weakref.ref(output), output._version, gate.detach()))
        return output

    def pack(tensor: Tensor) -> Any:
        for reference, version, gate in made:
            output = reference()
            # its memory is its own while it lives; an edit in place makes it another value
            if output is not None and output._version == version and _same(output, tensor):
                return partial(plain, gate)
        return tensor, tensor._version

    with replaced([(phi, "forward", noted)]), saved_tensors_hooks(pack, _unpack):
        return forward(*args, **kwargs)


def _same(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.dtype, a.shape, a.stride()) == (b.data_ptr(), b.dtype, b.shape, b.stride())


def _unpack(saved: Any) -> Tensor:
    if not isinstance(saved, tuple):
        return saved()
    tensor, version = saved
    if tensor._version != version:  # torch checks this only of tensors without hooks
        raise RuntimeError(
            f"a tensor {tuple(tensor.shape)} of a feed-forward part was changed in place before its gradient was "
            "computed: change a copy"
        )
    return tensor
