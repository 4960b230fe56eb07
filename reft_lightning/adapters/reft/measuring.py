r"""Observe what each intervention does while a ReFT model runs, and leave out some of the edits.

The model is not changed: torch hooks are on the interventions only inside a ``with`` block. They do not see compiled
passes.

Shapes: b rows, s columns, n tokens that one intervention edits, d width, k directions, p places.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...interventions import Intervention, registered
from ...interventions.base import at_least_float32
from ..attaching import unseen_draws
from ..masks import Spans
from ..saving import load_adapter
from .calls import EditPlan, call_of
from .model import ReftModel
from .positions import Positions, Term
from .sites import Site

TINY = 1e-12  # smallest norm of h in a ratio, to avoid 0 / 0


class Seen(NamedTuple):
    """One intervention's edit of its tokens in one pass."""

    layer: int
    places: Tensor  # (n,), each token's index into places_of(reft)
    before: Tensor  # (n, d), h
    after: Tensor  # (n, d), Phi(h)
    latents: Tensor | None = None  # (n, k), the features the intervention detects


def places_of(reft: ReftModel) -> list[str]:
    """Return the names of the positions of all layers, from left to right: f1, f2, ..., l2, l1, ..., decode:1.

    An unbounded term (``all``, ``prompt``, ``decode``) is one place; a callable is ``selected``.
    """
    names = [
        name for positions, _ in reft.positions.values() for group in _names(positions) for name in group
    ]
    order = ["f", "prompt", "image", "text", "given", "critical", "all", "selected", "l", "decode"]

    def key(name: str) -> tuple[int, int]:
        kind = name if name in order else name.rstrip("0123456789.").rstrip(":")
        number = int("".join(filter(str.isdecimal, name)) or 0)
        return order.index(kind), -number if kind == "l" else number

    return sorted(dict.fromkeys(names), key=key)


def _names(positions: Positions) -> list[list[str]]:
    """Return a name for each slot of each group."""
    if positions.function is not None:
        return [["selected"]]
    return [
        [str(t)] if t.slots is None else [str(Term(t.kind, k + 1)) for k in range(t.slots)]
        for t in positions.terms
    ]


@contextmanager
def watching(reft: ReftModel, see: Callable[[Seen], Tensor | None]) -> Iterator[None]:
    """Call a function for each edit inside the block; its result replaces Phi(h) unless it is None."""
    places = {name: i for i, name in enumerate(places_of(reft))}
    first = reft.adapter_names[0]
    if any(site.visual for site in reft.sites.values()):
        raise ValueError(
            "edits in a vision tower or its connector have no positions in a text and cannot be measured"
        )
    grids: dict[Positions, tuple[EditPlan, Tensor]] = {}  # for the current pass

    def hook(key: str, number: int, phi: Any, args: Any, after: Tensor) -> Tensor | None:
        call = call_of(reft)
        assert call is not None
        assert call.plan is not None
        positions, _ = reft.positions[key]
        if positions not in grids or grids[positions][0] is not call.plan:
            grids[positions] = call.plan, _grid(positions, call.plan.spans, call.plan.tokens, places)
        edit = next(e for e in call.plan.edits[reft.sites[key].place] if e.adapter == first)
        filled = grids[positions][1][edit.indices[number] // reft.sites[key].divided]
        found = args[2].found if len(args) > 2 else None  # for an intervention that sees rows
        return see(Seen(int(key), filled.to(after.device), args[0], after, found and found.latents))

    with ExitStack() as hooks:
        for key, group in reft.interventions.items():
            for number, phi in enumerate(group):
                hooks.enter_context(phi.register_forward_hook(partial(hook, key, number)))
        yield


def _grid(positions: Positions, spans: Spans, tokens: Tensor, places: Mapping[str, int]) -> Tensor:  # (b s,)
    """Return the place of each token that the current pass reads, row by row; -1 if it is not selected."""
    here = spans.upto(spans.read, len(tokens))
    found = torch.full(here.prompt.shape, -1, device=here.prompt.device)
    groups = positions.select(here.prompt, here.target, here.marks)
    for names, slots in zip(_names(positions), groups, strict=True):
        lookup = torch.tensor([places[name] for name in names], device=slots.device)
        found = torch.where(slots >= 0, lookup[slots.clamp(min=0)], found)
    return found[:, spans.read - tokens.shape[1] : spans.read].flatten()


@contextmanager
def leaving_out(
    reft: ReftModel, layers: Collection[int] = (), places: Collection[str] = ()
) -> Iterator[None]:
    """Inside the block, leave out the edits of some layers, and those of some positions in every layer."""
    names, edited = places_of(reft), [int(key) for key in reft.interventions]
    for given, known, what in ((layers, edited, "layer"), (places, names, "position")):
        if strange := [item for item in given if item not in known]:
            raise ValueError(f"{what} {strange[0]!r} is not edited; these are: {', '.join(map(str, known))}")
    off = torch.tensor([names.index(name) for name in places], dtype=torch.long)

    def see(seen: Seen) -> Tensor | None:
        if seen.layer in layers:
            return seen.before
        if not len(off):
            return None
        left = torch.isin(seen.places, off.to(seen.places.device))
        return torch.where(left.unsqueeze(-1), seen.before, seen.after)

    with watching(reft, see):
        yield


class EditNorms:
    r"""Mean :math:`\lVert\Phi(h) - h\rVert / \lVert h\rVert` by layer and position; pass it to :func:`watching`.

    Attributes:
        ratios: layer -> (p,) sum of the ratios.
        edits: layer -> (d,) sum of :math:`\Phi(h) - h` over all tokens.
        counts: layer -> (p,) number of tokens.
    """

    def __init__(self, reft: ReftModel) -> None:
        self.places = places_of(reft)
        self.divided = {site.layer for site in reft.sites.values() if site.divided > 1}
        self.ratios: dict[int, Tensor] = {}
        self.edits: dict[int, Tensor] = {}
        self.counts: dict[int, Tensor] = {}

    def __call__(self, seen: Seen) -> None:
        """Add the edits of one intervention in one pass."""
        before = seen.before.detach().float()
        edit = seen.after.detach().float() - before
        ratio = edit.norm(dim=-1) / before.norm(dim=-1).clamp(min=TINY)  # (n,)
        zero = ratio.new_zeros(len(self.places))
        ratios, counts = (zero.index_add(0, seen.places, x) for x in (ratio, torch.ones_like(ratio)))
        for sums, new in ((self.ratios, ratios), (self.edits, edit.sum(0)), (self.counts, counts)):
            sums[seen.layer] = sums[seen.layer] + new if seen.layer in sums else new

    def by_place(self) -> dict[int, Tensor]:  # layer -> (p,)
        """Return the means; NaN for a place without tokens."""
        return {layer: total / self.counts[layer] for layer, total in self.ratios.items()}

    def by_layer(self) -> dict[int, Tensor]:  # layer -> ()
        """Return the means over all tokens."""
        return {layer: total.sum() / self.counts[layer].sum() for layer, total in self.ratios.items()}

    def mean_edits(self) -> dict[int, Tensor]:  # layer -> (d,)
        """Return the mean of Phi(h) - h, without layers whose attention heads are edited, each in its own space."""
        return {
            layer: total / self.counts[layer].sum()
            for layer, total in self.edits.items()
            if layer not in self.divided
        }


def interventions_by_layer(reft: ReftModel) -> dict[int, list[Intervention]]:
    """Return the interventions of each layer."""
    return {int(key): list(group) for key, group in reft.interventions.items()}


def saved_interventions(folder: str | PathLike) -> dict[int, list[Intervention]]:
    """Return the interventions of a saved adapter by layer, without its base model.

    Raises:
        FileNotFoundError: if the folder does not hold a ReFT adapter.
        ValueError: if the method is not registered, or tensors do not fit.
    """
    config, state = load_adapter(folder)
    found: dict[int, list[Intervention]] = {}
    for layer in config.layers:
        spec = config.for_layer(layer)
        found[layer] = []
        while own := _below(state, f"interventions.{layer}.{len(found[layer])}."):
            width = max(tensor.shape[-1] for tensor in own.values() if tensor.ndim)
            with at_least_float32(), unseen_draws():
                phi = registered(spec.method)(width, **spec.settings)
            try:
                phi.load_state_dict(own)
            except RuntimeError as error:
                raise ValueError(f"{folder}: layer {layer} does not fit {spec.method}: {error}") from error
            found[layer].append(phi)
    return found


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def subspace(interventions: list[Intervention]) -> Tensor | None:  # -> (k, d)
    """Return orthonormal rows, in float64, that span the edits of some interventions; None if nothing bounds them.

    All interventions must edit the same representation; two attention heads are two representations.
    """
    rows = []
    with torch.no_grad():
        for phi in interventions:
            if phi.directions is None:
                return None
            rows.append(phi.directions.double())
    _, sizes, basis = torch.linalg.svd(torch.cat(rows), full_matrices=False)
    return basis[sizes > sizes.max() * 1e-6]


def _by_head(group: list[Intervention], site: Site) -> dict[int, list[Intervention]]:
    """Return the interventions of each attention head; empty if the site has no heads."""
    heads = site.heads if site.divided > 1 else ()
    return {head: group[k :: len(heads)] for k, head in enumerate(heads)}


def longest_heads(reft: ReftModel, count: int) -> dict[int, dict[str, str]]:
    """Return the attention heads whose parameters have the largest norm, as ``layers`` for a second stage.

    Args:
        reft: a model with interventions at ``head_output``, such as LoFiT's first stage.
        count: the number of heads; LoFiT takes 3 to 10 % of all.

    Raises:
        ValueError: if there are fewer heads with interventions, or none.
    """
    sizes = [
        (sum(float(p.detach().square().sum()) for phi in own for p in phi.parameters()), int(layer), head)
        for layer, group in reft.interventions.items()
        for head, own in _by_head(list(group), reft.sites[layer]).items()
    ]
    if not sizes:
        raise ValueError("no attention head has an intervention: attach with component='head_output'")
    if not 1 <= count <= len(sizes):
        raise ValueError(
            f"count must lie in 1..{len(sizes)}, the number of heads with interventions; got {count}"
        )
    chosen: dict[int, list[int]] = {}
    for _, layer, head in sorted(sizes, reverse=True)[:count]:
        chosen.setdefault(layer, []).append(head)
    return {
        layer: {"component": f"head_output:{'+'.join(map(str, sorted(heads)))}"}
        for layer, heads in sorted(chosen.items())
    }
