r"""Edits that are exactly equivalent to a change of one linear map of the base model.

If every token is edited, an affine edit :math:`K h + k` at the output or at the input of a linear map
:math:`x \mapsto M x + m` gives another linear map:

======== ============================= ================ =============
site     edited                        change of M      change of m
======== ============================= ================ =============
output   h + K h + k, with h = M x + m  K M             K m + k
input    M (h + K h + k) + m            M K             M k
======== ============================= ================ =============

The low-rank family has :math:`K = U^\top V` of rank r, so both changes of M have rank r. Everything is computed in
float64 on the CPU. No other edit can become a weight: a weight acts on all tokens alike, and many maps read the
residual stream.

Letters: d width of the representation, r rank, M (out, in), m (out,).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..adapters.attaching import NOTE
from ..adapters.reft.model import ReftModel
from ..adapters.reft.sites import Site, hidden_of
from ..base_models.bare import bare_copy
from ..base_models.stacks import reads_two_texts
from ..interventions import Intervention, Partition, Subspace

EXACT = 1e-9  # relative, in float64


class Change(NamedTuple):
    """The change of a linear map's weight, B A or ``dense`` if the edit is not low-rank, and of its bias."""

    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    dense: Tensor | None  # (out, in)
    bias: Tensor  # (out,)

    @property
    def weight(self) -> Tensor:  # (out, in)
        """The change of M."""
        return self.B @ self.A if self.dense is None else self.dense


@dataclass(frozen=True)
class Fold:
    """An intervention and the linear map of the base model that it can be folded into."""

    site: Site
    path: str  # of the linear map
    linear: nn.Linear | Conv1D
    phi: Intervention
    scale: float

    def change(self) -> Change:
        """Return the change of the linear map."""
        try:
            U, V, k = affine(self.phi, self.site.dim)
        except ValueError as error:
            raise ValueError(f"layer {self.site.layer} cannot become weights: {error}") from error
        V, k = self.scale * V, self.scale * k
        M, m = weight_of(self.linear), self.linear.bias
        low = len(U) < self.site.dim
        if self.site.end == "input":
            return Change(V, M @ U.mT, None if low else M @ U.mT @ V, M @ k)
        own = k.new_zeros(len(k)) if m is None else m.detach().to("cpu", torch.float64)
        return Change(V @ M, U.mT, None if low else U.mT @ (V @ M), U.mT @ (V @ own) + k)


def affine(phi: Intervention, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return U, V (r, d) and k (d,) with :math:`\text{edit}(h) = U^\top V h + k`.

    The low-rank family gives them directly. Any other affine map is determined by its values at 0 and at the basis
    vectors, which give :math:`K = U^\top V`. U is its ``directions`` if they span K; otherwise U = I and V = K.

    Raises:
        ValueError: if the edit is not affine, or not finite.
    """
    if not phi.edits_tokens:
        raise ValueError(
            f"{type(phi).__name__} depends on more than single tokens, and no weight can do that"
        )
    if isinstance(phi, Partition) or (isinstance(phi, Subspace) and type(phi).edit is Subspace.edit):
        U, V, c = (tensor.cpu() for tensor in phi.affine())
        return U, V, U.mT @ c
    phi = copy.deepcopy(phi).to("cpu", torch.float64).eval().requires_grad_(False)
    k = phi.edit(torch.zeros(1, dim, dtype=torch.float64))[0]
    K = (phi.edit(torch.eye(dim, dtype=torch.float64)) - k).mT
    directions = phi.directions
    for size in (1.0, 1e6):  # an activation may act only on large tokens, like ReLU with a large bias
        probes = size * torch.randn(4, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        found = phi.edit(probes)
        if not found.isfinite().all():
            raise ValueError(f"{type(phi).__name__} has NaN or infinite values: its training diverged")
        # if the edit is constant, K is noise
        largest = max(float(found.abs().max()), size * float(k.abs().max()))
        if not torch.allclose(found, probes @ K.mT + k, rtol=EXACT, atol=EXACT * largest):
            raise ValueError(
                f"{type(phi).__name__} is not an affine function of h, so no weight can compute it"
            )
    if directions is not None:
        V = torch.linalg.pinv(directions).mT @ K  # (r, d) @ (d, d)
        size = max(float(K.abs().max()), float(k.abs().max()))
        if torch.allclose(directions.mT @ V, K, rtol=EXACT, atol=EXACT * size):
            return directions, V, k
    return torch.eye(dim, dtype=torch.float64), K, k


def weight_of(linear: nn.Linear | Conv1D) -> Tensor:  # -> (out, in)
    """Return M in float64."""
    weight = linear.weight.detach().to("cpu", torch.float64)
    return weight.mT if isinstance(linear, Conv1D) else weight


def folds_of(reft: ReftModel) -> list[Fold]:
    """Return the fold of each intervention of the active adapters.

    Raises:
        ValueError: if one cannot be folded, saying which and why.
    """
    if not isinstance(reft, ReftModel) or reft.config.beside:
        raise ValueError(
            f"only interventions without a baseline can become weights; got a {type(reft).__name__}"
        )
    reft.adapter_state_dict()  # raises if the adapter is detached
    model = reft.base_model
    if len(attached := vars(model)[NOTE].configs) > 1:
        raise ValueError(
            f"{len(attached)} adapters are attached to this {type(model).__name__}: merging one of them would change "
            "the others; detach() those"
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            f"this {type(model).__name__} is quantized, and quantized weights cannot hold the sum: attach the adapter "
            "to the model in full precision"
        )
    edits: list[tuple[Site, Intervention, float]] = []
    for choice in reft.adapters.active:
        adapter = reft.adapters[choice.adapter]
        for key, site in adapter.sites.items():
            positions, _ = adapter.positions[key]
            if str(positions) != "all":
                raise ValueError(
                    f"layer {site.layer} cannot become weights: it edits the positions {positions}, but a weight acts "
                    "on all tokens; only positions='all' can be merged"
                )
            if site.divided > 1:
                raise ValueError(
                    f"layer {site.layer} cannot become weights: each of its heads has its own intervention"
                )
            edits.append((site, adapter.interventions[key][0], adapter.scale * choice.weight))
    modules = dict(model.named_modules())
    paths = _linear_maps(model, modules, [site for site, *_ in edits])
    folds: list[Fold] = []
    for site, phi, scale in edits:
        path = paths[site]
        if any(path == fold.path for fold in folds):
            raise ValueError(
                f"layer {site.layer} cannot become weights: {path} already has another intervention"
            )
        folds.append(Fold(site, path, _plain(modules[path], path), phi, scale))
    return folds


def _linear_maps(
    model: PreTrainedModel, modules: dict[str, nn.Module], sites: Sequence[Site]
) -> dict[Site, str]:
    """Return, for each site, the path of the linear map whose output or input is edited."""
    found = {site: site.path for site in sites if _is_linear(modules[site.path])}
    others = [site for site in sites if site not in found]
    if inputs := [site for site in others if site.end == "input"]:
        raise ValueError(
            f"layer {inputs[0].layer} cannot become weights: the input of {inputs[0].path} is not the input of one "
            f"linear map; name the map, as in '...{{layer}}.mlp.down_proj.input'"
        )
    if others:
        last = _last_maps(model, [site.path for site in others])
        for site in others:
            if site.path not in last:
                raise ValueError(
                    f"layer {site.layer} cannot become weights: the output of {site.path}, a "
                    f"{type(modules[site.path]).__name__}, is not the output of one linear map. Components that can be "
                    "merged are attention_output and mlp_output in most decoders, or the path of a linear map"
                )
            found[site] = last[site.path]
    return found


def _last_maps(model: PreTrainedModel, paths: list[str]) -> dict[str, str]:
    """Return, for each module that returns the output of a linear map inside it, the path of that map."""
    try:
        tried = bare_copy(model)
    except Exception as error:  # modules were changed after the model was created
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(
            f"cannot find the linear maps at the end of {paths[0]} and similar modules, as {type(model).__name__} "
            f"cannot be copied ({reason}): name the map, as in '...{{layer}}.mlp.down_proj'"
        ) from error
    returned: dict[str, Any] = {}  # linear map -> output
    last: dict[str, str] = {}

    def note(path: str, module: nn.Module, args: tuple, output: Any) -> None:
        returned[path] = output

    def compare(path: str, module: nn.Module, args: tuple, output: Any) -> None:
        for name, tensor in returned.items():
            # dropout in eval mode returns its input
            if name.startswith(f"{path}.") and tensor is hidden_of(output):
                last[path] = name

    for name, module in tried.named_modules():
        if _is_linear(module):
            module.register_forward_hook(partial(note, name))
    for path in paths:
        tried.get_submodule(path).register_forward_hook(partial(compare, path))
    ids = torch.full((1, 4), 3, device=model.device)
    with torch.no_grad():
        tried(input_ids=ids, **({"decoder_input_ids": ids} if reads_two_texts(model) else {}))
    return last


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D) or hasattr(module, "base_layer")


def _plain(module: Any, path: str) -> nn.Linear | Conv1D:
    if not isinstance(module, nn.Linear | Conv1D) or not module.weight.is_floating_point():
        raise ValueError(
            f"{path} is a {type(module).__module__}.{type(module).__name__}, whose weights cannot be changed exactly "
            "(merge a peft adapter first, or attach to a model that is not quantized)"
        )
    if module.weight.is_meta:
        raise ValueError(f"the weights of {path} are not in memory; load the model without offloading")
    if isinstance(module, nn.Linear) and type(module) is not nn.Linear and not _computes_its_weights(module):
        raise ValueError(f"{path}, a {type(module).__name__}, computes something other than M x + m")
    return module


def _computes_its_weights(module: nn.Linear) -> bool:
    x = torch.linspace(-1, 1, module.in_features).to(module.weight)
    with torch.no_grad():
        found, expected = module(x), nn.functional.linear(x, module.weight, module.bias)
    rounding = 10 * torch.finfo(x.dtype).eps * float(expected.abs().max())
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=rounding)
