r"""Adapters of pyreft: ``config.json`` and one pickled ``intkey_....bin`` per intervention, as written by its ``save``.

=====================  ====================  ==========================================================
pyreft                 here                  tensors in a file; r rank, d width
=====================  ====================  ==========================================================
LoreftIntervention     loreft                weight (r, d), bias (r), rotate_layer (d, r)
DireftIntervention     direft_orthonormal    learned_source.weight, .bias, R in torch's parametrization
NoreftIntervention     noreft                learned_source.weight, .bias, proj_layer.weight, .bias or none
NodireftIntervention   direft                the same; the second bias is not used
ConsreftIntervention   consreft              learned_source (r), R in torch's parametrization
LobireftIntervention   lobireft              the same
=====================  ====================  ==========================================================

R in torch's parametrization is ``rotate_layer.parametrizations.weight.original`` (d, r) and ``.0.base`` (d, d); see
:func:`.foreign.orthogonal_map`. The same site twice means untied in pyreft: the first intervention edits the prefix,
the second the suffix. pyvene 0.1.7 changed the separator in file names from ``.`` to ``_``.

The files do not contain positions, act_fn or dropout. pyreft's positions are ``fN``, ``lN`` and ``fN+lM`` in the
prompt, each at most half of it, rounded down: ``clip="floor"`` here. pyreft also adds a pad token in front, for unused
slots to edit. It is not needed here and does not change results.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..adapters.attaching import all_or_nothing, check_base
from ..adapters.hub import folder_with
from ..adapters.reft.config import ReftConfig
from ..adapters.reft.model import ReftModel
from ..adapters.reft.positions import parse_positions
from ..adapters.reft.sites import block_path
from ..base_models.heads import parameters_of
from ..interventions import Intervention, method_name
from ..storage.atomic import write_json, write_whole
from ..storage.reading import naming, read_json
from .foreign import attached, check_alone, in_memory, orthogonal_map, read_pickled, take

log = logging.getLogger(__name__)

CONFIG, HEADS = "config.json", "pytorch_model.bin"
CLASSES = {
    "LoreftIntervention": "loreft",
    "DireftIntervention": "direft_orthonormal",
    "NoreftIntervention": "noreft",
    "NodireftIntervention": "direft",
    "ConsreftIntervention": "consreft",
    "LobireftIntervention": "lobireft",
}
# same name and meaning in both libraries
COMPONENTS = ("block_output", "block_input", "attention_output", "mlp_output")
# fields of pyvene's RepresentationConfig, in order, and those without a counterpart here
FIELDS = (
    "layer", "component", "unit", "max_number_of_units", "low_rank_dimension", "intervention_type", "intervention",
    "subspace_partition", "group_key", "intervention_link_key", "moe_key", "source_representation",
    "hidden_source_representation", "latent_dim",
)  # fmt: skip
FOREIGN = ("subspace_partition", "intervention_link_key", "moe_key", "source_representation")
OURS = "reft_lightning"  # the key in config.json for everything that pyreft's files cannot store
PARAMETER = "rotate_layer.parametrizations.weight.original"
BUFFER = "rotate_layer.parametrizations.weight.0.base"


def from_pyreft(
    base_model: PreTrainedModel,
    name: str | PathLike,
    *,
    positions: str | None = None,
    act_fn: str | None = None,
    dropout: float = 0.0,
) -> ReftModel:
    """Attach an adapter saved by pyreft.

    Args:
        base_model: the model it was trained on.
        name: a folder, or the name of a repository on the Hugging Face hub.
        positions: the positions it was trained with, such as ``f7+l7``, which pyreft does not save.
        act_fn: the activation it was trained with, which pyreft does not save; None for none.
        dropout: dropout for further training; as in pyreft, it drops entries of the whole edited state.

    Raises:
        ValueError: if files are damaged, incomplete, or of another library or model, naming the file and the reason; if
            positions are missing; or if the adapter uses something without a counterpart here.
        FileNotFoundError: if there are no such files.
    """
    check_base(base_model)
    folder = folder_with(str(name), (CONFIG, "intkey_*.bin", HEADS), CONFIG)
    values = read_json(folder / CONFIG)
    heads = read_pickled(folder / HEADS) if (folder / HEADS).is_file() else {}
    head_state = {f"heads.{path}": tensor for path, tensor in heads.items()}
    if isinstance(values.get(OURS), dict) and positions is None and act_fn is None and not dropout:
        with naming(folder / CONFIG), all_or_nothing(base_model):
            reft = in_memory(ReftModel(base_model, ReftConfig.from_dict(values[OURS])))
            state = {}
            for layer in reft.config.layers:
                site = _component(reft.config.for_layer(layer).component, layer)
                for group, phi in enumerate(reft.interventions[str(layer)]):
                    read = _read(_file(folder, layer, site, 1, group), _class_of(type(phi)))[1]
                    state |= {f"interventions.{layer}.{group}.{key}": tensor for key, tensor in read.items()}
            reft.load_adapter_state_dict(state | head_state)
            return reft.eval()
    if positions is None:
        raise ValueError(
            f"{folder}: pyreft does not save positions: pass those used in training, such as "
            "from_pyreft(model, name, positions='f7+l7')"
        )
    layers, state = _interventions(folder, values, block_path(base_model))
    if act_fn is not None:
        for own in layers.values():
            own["act_fn"] = act_fn
    untied = [layer for layer, own in layers.items() if own["tied"] == "group"]
    if untied and [term.kind for term in parse_positions(positions).terms] != ["f", "l"]:
        raise ValueError(
            f"{folder}: layer {untied[0]} has one intervention for the prefix and one for the suffix (share_weights="
            f"False in pyreft), so positions need a term for each, such as 'f3+l3'; got {positions!r}"
        )
    settings: dict[str, Any] = {"dropout": dropout, "dropout_on": "output"} if dropout else {}
    return attached(
        base_model, folder, layers, state | head_state, positions=positions, clip="floor",
        heads=sorted({path.rpartition(".")[0] for path in heads}), **settings,
    )  # fmt: skip


def _interventions(
    folder: Path, values: dict[str, Any], blocks: str
) -> tuple[dict[int, dict[str, Any]], dict[str, Tensor]]:
    """Return settings by layer, and tensors under this library's names."""
    representations, types = values.get("representations"), values.get("intervention_types")
    if not isinstance(representations, list) or not isinstance(types, list) or not representations:
        raise ValueError(
            f"{folder / CONFIG} is not from pyreft: it does not list representations and intervention_types"
        )
    if len(representations) != len(types):
        raise ValueError(
            f"{folder / CONFIG} is damaged: it has {len(representations)} representations, but {len(types)} "
            "intervention_types"
        )
    layers: dict[int, dict[str, Any]] = {}
    state: dict[str, Tensor] = {}
    seen: Counter[tuple] = Counter()
    for representation, text in zip(representations, types, strict=True):
        if not isinstance(representation, list | dict):
            raise ValueError(
                f"{folder / CONFIG} is damaged: a representation must be a list or a dict; got {representation!r}"
            )
        listed = isinstance(representation, list)
        fields = dict(zip(FIELDS, representation, strict=False)) if listed else representation
        name = str(text).removesuffix("'>").rpartition(".")[2]
        if name not in CLASSES:
            raise ValueError(
                f"{folder / CONFIG} has an unknown intervention {name}; pyreft's are {', '.join(CLASSES)}"
            )
        foreign = [field for field in FOREIGN if fields.get(field) is not None]
        if fields.get("unit", "pos") != "pos" or foreign:
            raise ValueError(
                f"{folder / CONFIG} uses pyvene's {', '.join(foreign) or 'unit ' + str(fields['unit'])}, which has no "
                "counterpart here: interventions edit single tokens of one layer"
            )
        site, units = fields.get("component", "block_output"), fields.get("max_number_of_units", 1)
        key = (fields.get("layer", 0), site, units)
        group, seen[key] = seen[key], seen[key] + 1
        settings, tensors = _read(_file(folder, *key, group), name)
        with naming(folder / CONFIG):
            layer, component = _site(str(site), fields.get("layer", 0), blocks)
        own = {"method": CLASSES[name], "component": component, **settings}
        if layers.setdefault(layer, own | {"tied": "all"}) != own | {"tied": "all"}:
            raise ValueError(
                f"{folder / CONFIG}: layer {layer} has interventions of several kinds, {own} and {layers[layer]}; "
                "here a layer has one site with one intervention, or with one for the prefix and one for the suffix"
            )
        state |= {f"interventions.{layer}.{group}.{path}": tensor for path, tensor in tensors.items()}
    for (layer, site, _), count in seen.items():
        if count > 2:
            raise ValueError(
                f"{folder / CONFIG}: layer {layer} has {count} interventions at {site}; pyreft has 1 or 2"
            )
        if count == 2:
            layers[_site(str(site), layer, blocks)[0]]["tied"] = "group"
    return layers, state


def _file(folder: Path, layer: int, component: str, units: int, group: int) -> Path:
    """Return the file of an intervention, whichever version of pyvene wrote it."""
    paths = [folder / f"intkey_{_key(layer, component, units, group, separator)}.bin" for separator in "_."]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        there = ", ".join(sorted(path.name for path in folder.glob("*.bin"))) or "none"
        raise ValueError(
            f"{paths[0]} is missing (also under its older name {paths[1].name}); .bin files there: {there}"
        )
    return found


def _key(layer: int, component: str, units: int, group: int, separator: str = "_") -> str:
    """Return pyvene's name for an intervention; older versions use dots as separators."""
    place = f"comp.{component}" if "." in component else f"layer.{layer}.comp.{component}"
    return f"{place}.unit.pos.nunit.{units}".replace(".", separator) + f"#{group}"


def _read(path: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the settings and tensors of one intervention under this library's names."""
    state = read_pickled(path)
    R: Tensor | None = None
    if name == "LoreftIntervention":
        W, b, R = take(path, state, {"weight": 2, "bias": 1, "rotate_layer": 2}, name)
    elif name in ("ConsreftIntervention", "LobireftIntervention"):
        W, (b,) = None, take(path, state, {"learned_source": 1}, name)
    else:
        W, b = take(path, state, {"learned_source.weight": 2, "learned_source.bias": 1}, name)
    tensors = {"bias": b} if W is None else {"source.weight": W, "source.bias": b}
    settings: dict[str, Any] = {"rank": len(b)}
    if W is not None and W.dtype == torch.bfloat16:
        settings["weight_dtype"] = "bfloat16"
    if name in ("NoreftIntervention", "NodireftIntervention"):
        (tensors["projection.weight"],) = take(path, state, {"proj_layer.weight": 2}, name)
        if name == "NoreftIntervention" and "proj_layer.bias" in state:
            tensors["projection.bias"], settings["add_bias"] = state["proj_layer.bias"], True
        return settings, tensors
    if R is None:
        R = orthogonal_map(*take(path, state, {PARAMETER: 2, BUFFER: 2}, name))
    # the initial length of rows here, see orthonormal.random_rows; R itself is the same
    return settings, tensors | {"basis": R.mT / 2}


def _site(component: str, layer: int, blocks: str) -> tuple[int, str]:
    """Return the layer and component of pyvene's component, which can be a path: ``model.layers[3].mlp.output``."""
    if component in COMPONENTS:
        return layer, component
    path = re.sub(r"\[(\d+)\]", r".\1", component)
    found = re.fullmatch(rf"{re.escape(blocks)}\.(\d+)((?:\..+)?)\.(input|output)", path)
    if not found:
        raise ValueError(
            f"pyvene's component {component!r} has no counterpart here; known are {', '.join(COMPONENTS)}, and paths "
            f"such as '{blocks}[3].mlp.output'"
        )
    if not found[2]:
        return int(found[1]), f"block_{found[3]}"
    return int(found[1]), f"{blocks}.{{layer}}{found[2]}" + (".input" if found[3] == "input" else "")


# --- writing --------------------------------------------------------------------------------------------------------


def to_pyreft(reft: ReftModel, folder: str | PathLike) -> None:
    """Write an adapter in pyreft's format, and log the arguments needed to use it there.

    The key ``reft_lightning`` in config.json stores them, so :func:`from_pyreft` needs no arguments.

    Raises:
        ValueError: if pyreft does not support an intervention, tying, site or scale.
    """
    check_alone(reft, "pyreft")
    config = reft.config
    if reft.scale != 1:
        raise ValueError(
            f"pyreft has no scale, but this adapter has scale={reft.scale}: set it to 1 before to_pyreft"
        )
    specs = {layer: config.for_layer(layer) for layer in config.layers}
    for layer, spec in specs.items():
        site, count = reft.sites[str(layer)], len(reft.interventions[str(layer)])
        if spec.method not in CLASSES.values():
            raise ValueError(
                f"layer {layer}: pyreft has no intervention {spec.method!r}; it has {', '.join(CLASSES.values())}"
            )
        if site.visual:
            raise ValueError(f"layer {layer}: pyreft has no {spec.component}, which sees images")
        if site.divided > 1:
            raise ValueError(f"layer {layer}: interventions on attention heads cannot be written for pyreft")
        if spec.tied == "position" or count > 2:
            raise ValueError(
                f"layer {layer}: pyreft has one intervention for all positions, or one for the prefix and one for the "
                f"suffix; got tied={spec.tied!r} with {count} interventions"
            )
        if count == 2 and [term.kind for term in reft.positions[str(layer)][0].terms] != ["f", "l"]:
            raise ValueError(
                f"layer {layer}: pyreft's two interventions are for a prefix and a suffix, such as 'f3+l3'; got "
                f"positions={spec.positions!r}"
            )
    # pyreft's order: first the first intervention of every layer, then the second
    written = [
        (layer, group, phi)
        for group in range(2)
        for layer in config.layers
        for phi in reft.interventions[str(layer)][group : group + 1]
    ]
    if not written:
        raise ValueError("this adapter has no interventions, so there is nothing to write for pyreft")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    representations, keys = [], []
    for layer, group, phi in written:
        site = _component(specs[layer].component, layer)
        keys.append(_key(layer, site, 1, group))
        representations.append([layer, site, "pos", 1, phi.rank, *[None] * (len(FIELDS) - 5)])
        tensors = _tensors(phi)
        write_whole(folder / f"intkey_{keys[-1]}.bin", lambda partial, t=tensors: torch.save(t, partial))
    if config.heads:
        heads = {name: p.detach() for name, p in parameters_of(reft.base_model, config.heads).items()}
        write_whole(folder / HEADS, lambda partial: torch.save(heads, partial))
    types = [f"<class 'pyreft.interventions.{_class_of(type(phi))}'>" for *_, phi in written]
    write_json(folder / CONFIG, {
        "intervention_constant_sources": [True] * len(written),
        "intervention_dimensions": [phi.dim for *_, phi in written], "intervention_types": types,
        "mode": "parallel", "representations": representations, "sorted_keys": keys,
        OURS: reft.saved_config().to_dict(),
    })  # fmt: skip
    log.warning("%s", _what_pyreft_forgets(reft))


def _what_pyreft_forgets(reft: ReftModel) -> str:
    chosen = ", ".join(sorted({str(spec) for spec, _ in reft.positions.values()}))
    phis = [phi for group in reft.interventions.values() for phi in group]
    lost = [f"positions {chosen} (as unit_locations of each call)"]
    if any(spec.clip == "paper" and spec.needs_prompt for spec, _ in reft.positions.values()):
        lost += ["clip='paper' (its own helper halves short prompts, as clip='floor' does here)"]
    functions = {phi.act_fn for phi in phis} - {None}
    lost += [f"act_fn {name} (as an argument of the intervention)" for name in functions]
    if any(p.weight_dtype != "bfloat16" and "source.weight" in dict(p.named_parameters()) for p in phis):
        lost += ["float32 for W and b (dtype=torch.float32 in the intervention)"]
    if any(not p.rotations for p in phis):
        lost += ["add_bias=False (in the intervention; otherwise its ReftModel.load raises KeyError)"]
    if reft.config.heads:
        lost += ["the trained heads (include_model=True in ReftModel.load)"]
    return f"pyreft does not save these, so pass them when you load the adapter with it: {'; '.join(lost)}"


def _class_of(cls: type[Intervention]) -> str:
    return next(name for name, method in CLASSES.items() if method == method_name(cls))


def _component(component: str, layer: int) -> str:
    """Return pyvene's name for a component: a name, or a path with its end."""
    if "{layer}" not in component:
        return component
    path = component.replace(".{layer}", f"[{layer}]")
    return path if path.endswith((".input", ".output")) else f"{path}.output"


def _tensors(phi: Any) -> dict[str, Tensor]:
    """Return the tensors of an intervention as in pyreft's ``state_dict``."""
    with torch.no_grad():
        own = {name: tensor.detach().cpu().clone() for name, tensor in phi.state_dict().items()}
        R: Any = phi.R.cpu().mT.contiguous() if "basis" in own else None  # (d, r)
    source = {n.removeprefix("source."): t for n, t in own.items() if n.startswith("source.")}
    if _class_of(type(phi)) == "LoreftIntervention":
        return {**source, "rotate_layer": R}
    width = torch.tensor(phi.dim)
    tensors = {"embed_dim": width, "interchange_dim": width.clone()}
    tensors |= {f"learned_source.{name}": tensor for name, tensor in source.items()}
    tensors |= {f"proj_layer.{n.partition('.')[2]}": t for n, t in own.items() if n.startswith("projection.")}
    if R is not None:
        base = torch.linalg.qr(R, mode="complete").Q  # (d, d), which torch's map keeps
        base[:, : R.shape[1]] = R
        tensors |= {PARAMETER: -torch.eye(*R.shape), BUFFER: base}
    if "bias" in own:
        tensors["learned_source"] = own["bias"]
    return tensors
