"""One adapter: interventions with their sites and positions, as stored in one saved folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from ...base_models.dispatch import is_dispatched
from ...base_models.stacks import DECODER, ENCODER
from ...base_models.vision import image_tokens
from ...interventions import Orthonormal, Partition, check_settings, registered
from ...interventions.base import at_least_float32
from ...suggest import check_choice
from ..plain import finite, plain
from .config import LayerSpec, ReftConfig
from .critical import check_attends
from .positions import Positions, parse_positions
from .site_shapes import check_shapes
from .sites import Site, device_at, find_sites

TIED = ("all", "group", "position")


class Adapter(nn.Module):
    """A set of triples (Phi, P, l) whose positions do not overlap at any site.

    Built by :meth:`build`; layers are named by number, ``"0"``, ``"1"``, ...

    Attributes:
        config: all arguments it was attached with.
        interventions: layer -> the Phi of its positions.
        sites: layer -> the site of its Phi.
        positions: layer -> P, and how its Phi are tied.
        partitions: name -> rows, for the adapters that share this one's parameters.
        penalized: the Phi that can have a penalty on their parameters.
        seeing_rows: the class name of a Phi whose edits depend on more than single tokens; None if there is none.
        takes_source: whether any Phi takes hidden states from another text.
        critical: the numbers of critical tokens to find in a first pass.
    """

    def __init__(
        self,
        config: ReftConfig,
        interventions: Any,  # a ModuleDict
        sites: dict[str, Site],
        positions: dict[str, tuple[Positions, str]],
    ) -> None:
        super().__init__()
        self.config = config
        self.scale = config.scale
        self.interventions, self.sites, self.positions = interventions, sites, positions
        self.partitions: dict[str, list[int]] = {}
        self.layers_by_positions: dict[tuple[Positions, str], list[str]] = {}
        for layer, selection in positions.items():
            self.layers_by_positions.setdefault(selection, []).append(layer)
        phis = [phi for group in interventions.values() for phi in group]
        self.orthonormal = [phi for phi in self.modules() if isinstance(phi, Orthonormal)]
        self.penalized = [phi for phi in phis if phi.defines("penalty")]
        self.seeing_rows = next((type(phi).__name__ for phi in phis if phi.sees_rows), None)
        self.takes_source = any(phi.takes_source for phi in phis)
        self.critical = {found for spec, _ in positions.values() if (found := spec.critical)}

    @property
    def scale(self) -> float:
        """The strength of every edit."""
        return self._scale

    @scale.setter
    def scale(self, scale: Any) -> None:
        self._scale = finite("scale", plain("scale", scale))

    @classmethod
    def build(cls, base_model: PreTrainedModel, config: ReftConfig) -> Self:
        """Find the sites of a configuration in a model, and create its interventions with initial parameters."""
        specs = {layer: config.for_layer(layer) for layer in config.layers}
        sites = find_sites(base_model, {layer: spec.component for layer, spec in specs.items()})
        check_shapes(base_model, sites.values())
        interventions, positions = nn.ModuleDict(), {}
        for layer, spec in specs.items():
            site, key = sites[layer], str(layer)
            where = parse_positions(spec.positions, spec.clip)
            _check(base_model, spec, where, site)
            positions[key] = where, spec.tied
            device = device_at(base_model, site.path)
            if device.type == "meta" and is_dispatched(base_model):  # offloaded until used
                device = torch.get_default_device()
            with at_least_float32():
                group = _interventions(spec, where, site)
            interventions[key] = group if device == torch.get_default_device() else group.to(device)
        if any(spec.critical for spec, _ in positions.values()):
            check_attends(base_model)
        return cls(config, interventions, {str(layer): site for layer, site in sites.items()}, positions)

    def partition(self, rows: Sequence[int]) -> Self:
        """Return an adapter with the same parameters that edits only along some of its directions."""
        interventions = nn.ModuleDict(
            {
                layer: nn.ModuleList(Partition(phi, rows) for phi in group)
                for layer, group in self.interventions.items()
            }
        )
        return type(self)(self.config, interventions, self.sites, self.positions)


def _interventions(spec: LayerSpec, positions: Positions, site: Site) -> nn.ModuleList:
    copies = {"all": 1, "group": positions.groups}.get(spec.tied) or sum(positions.slots())
    cls = registered(spec.method)
    return nn.ModuleList(cls(site.dim, **spec.settings) for _ in range(copies * len(site.heads)))


def _check(model: PreTrainedModel, spec: LayerSpec, positions: Positions, site: Site) -> None:
    """Reject positions that do not exist at a site, and those at which an intervention cannot compute its edits."""
    check_choice("tied", spec.tied, TIED)
    cls = registered(spec.method)
    check_settings(cls, spec.settings)
    kinds = {term.kind for term in positions.terms}
    if site.visual:
        positions.share_of_images  # noqa: B018  raises for positions that are undefined there
        if cls.defines("edit_rows"):
            raise ValueError(f"{spec.method} needs the rows of a text, but {spec.component} sees only images")
    elif "image" in kinds and not image_tokens(model.config):
        raise ValueError(
            f"positions={positions}: {type(model).__name__} reads no images. prompt:S is a share of the prompt; "
            "`given` takes a mask in each call"
        )
    if site.stack == ENCODER and kinds == {"decode"}:
        raise ValueError(
            f"the encoder of {type(model).__name__} reads only prompts, in which positions={positions} selects no "
            "token: use component='decoder.block_output', or other positions"
        )
    if site.stack == DECODER and positions.needs_mask:
        raise ValueError(
            "edit_mask marks tokens of the encoder, so positions=given are undefined in the decoder"
        )
    if site.stack and (cls.takes_source or positions.critical):
        what = spec.method if cls.takes_source else f"positions={positions}"
        raise ValueError(
            f"{what} needs a first pass of the model, which is not supported for models with an encoder and a decoder"
        )
    if cls.takes_source == "same" and kinds & {"decode", "all"}:
        raise ValueError(
            f"{spec.method} exchanges tokens between prompts, but the positions {positions} also select tokens after "
            "the prompt: use fN, lN or prompt"
        )
    if cls.takes_source and kinds & {"given", "critical"}:
        raise ValueError(
            f"{spec.method} takes hidden states from another text, in which positions={positions} are unknown: use "
            "fN, lN or prompt"
        )
    after = [term.kind == "decode" for term in positions.terms]
    if cls.reads_prompt and after and (all if spec.tied == "all" else any)(after):
        raise ValueError(
            f"{spec.method} takes the strength of its edits from the prompt tokens that it edits, but with "
            f"positions={positions} and tied={spec.tied} "
            f"{'there are' if all(after) else 'the intervention for decode has'} none: use positions=all, or "
            "prompt+decode with tied=all"
        )
