r"""Adapters of AdapterHub's ``adapters``: ``adapter_config.json`` and a tensor file, as written by ``save_adapter``.

====================  ========================  ======
orthogonality         formula                   here
====================  ========================  ======
true (LoReftConfig)   h + R'(W h + b - R h)     loreft
false (NoReftConfig)  h + W2'(W1 h + b - W2 h)  noreft
false (DiReftConfig)  h + W2'(W1 h + b)         direft
====================  ========================  ======

Its files for NoReFT and DiReFT are the same, and adapters itself loads both as NoReFT. Suffix positions are the last
tokens of the whole text there, but of the prompt here. Without ``tied_weights`` it keeps a second unit for the suffix
even if there is no suffix; that one is left out.
"""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..adapters.attaching import check_base
from ..adapters.hub import folder_with
from ..adapters.reft.model import ReftModel
from ..adapters.saving import read_tensors
from ..storage.reading import read_json
from .foreign import attached, orthogonal_map, read_pickled, take

CONFIG = "adapter_config.json"
TENSORS, HEADS = (
    ("adapter.safetensors", "pytorch_adapter.bin"),
    ("model_head.safetensors", "pytorch_model_head.bin"),
)
ACTIVATIONS = {"leakyrelu": "leaky_relu"}  # the only name that differs from transformers
UNIT = re.compile(r"(.*)\.(\d+)\.reft_layer\.refts\.(.+)\.units\.(\d+)\.(.+)")


def from_adapters(
    base_model: PreTrainedModel, name: str | PathLike, *, method: str | None = None
) -> ReftModel:
    """Attach a ReFT adapter saved by AdapterHub's ``adapters``.

    Args:
        base_model: the model it was trained on.
        name: a folder, or the name of a repository on the Hugging Face hub.
        method: ``noreft`` or ``direft``, which the file does not tell apart; not needed for LoReFT.

    Raises:
        ValueError: if files are damaged, incomplete, or of another method or model, naming the file and the reason.
        FileNotFoundError: if there are no such files.
    """
    check_base(base_model)
    folder = folder_with(str(name), (CONFIG, *TENSORS, *HEADS), CONFIG)
    values = read_json(folder / CONFIG)
    config = values.get("config")
    if not isinstance(config, dict) or config.get("architecture") != "reft":
        held = config.get("architecture") if isinstance(config, dict) else None
        raise ValueError(
            f"{folder / CONFIG} is not a ReFT adapter: config.architecture is {held!r} instead of 'reft'"
        )
    needed = ("orthogonality", "prefix_positions", "suffix_positions", "r")
    if missing := [key for key in needed if key not in config]:
        raise ValueError(f"{folder / CONFIG} is damaged: config has no {', '.join(missing)}")
    counts = {"f": config["prefix_positions"], "l": config["suffix_positions"]}
    positions = "+".join(f"{letter}{count}" for letter, count in counts.items() if count)
    if not positions:
        raise ValueError(
            f"{folder / CONFIG} has no positions: prefix_positions and suffix_positions are both 0"
        )
    tied = "all" if config.get("tied_weights") else "group"
    path, saved = _read(folder, TENSORS)
    if path is None:
        raise FileNotFoundError(f"{folder} does not hold an adapter: {' or '.join(TENSORS)} is missing")
    used = [0] if tied == "all" else [i for i, n in enumerate(counts.values()) if n]
    layers, state = _units(path, saved, used)
    act_fn = config.get("non_linearity")
    settings: dict[str, Any] = {
        "method": _method(folder, config, method), "rank": config["r"], "positions": positions, "tied": tied,
    }  # fmt: skip
    if act_fn is not None:
        settings["act_fn"] = ACTIVATIONS.get(act_fn.lower(), act_fn.lower())
    if any(t.dtype == torch.bfloat16 for n, t in state.items() if n.endswith("source.weight")):
        settings["weight_dtype"] = "bfloat16"
    if config.get("dropout"):
        settings |= {"dropout": config["dropout"], "dropout_on": "output"}
    heads = _heads(base_model, folder)
    return attached(
        base_model, folder, dict.fromkeys(layers, settings), state | {f"heads.{n}": t for n, t in heads.items()},
        heads=sorted({path.rpartition(".")[0] for path in heads}),
    )  # fmt: skip


def _method(folder: Path, config: dict[str, Any], method: str | None) -> str:
    if config["orthogonality"]:
        if method not in (None, "loreft"):
            raise ValueError(f"{folder / CONFIG} is a LoReFT adapter (orthogonality); got method={method!r}")
        return "loreft"
    if method not in ("noreft", "direft"):
        raise ValueError(
            f"{folder / CONFIG}: adapters does not save whether this is NoReFT or DiReFT: pass the one that was "
            f"trained, method='noreft' or method='direft'; got {method!r}"
        )
    return method


def _units(path: Path, saved: dict[str, Tensor], used: list[int]) -> tuple[list[int], dict[str, Tensor]]:
    """Return the layers, and the tensors of the used units under this library's names."""
    units: dict[tuple[int, int], dict[str, Tensor]] = {}
    places, names = set(), set()
    for name, tensor in saved.items():
        found = UNIT.fullmatch(name)
        if found is None:
            raise ValueError(f"{path} contains {name}, which does not belong to a ReFT adapter")
        units.setdefault((int(found[2]), int(found[4])), {})[found[5]] = tensor
        places.add(found[1])
        names.add(found[3])
    if len(places) != 1 or len(names) != 1:
        raise ValueError(
            f"{path} must contain one adapter at one list of layers; got {', '.join(sorted(names)) or 'none'} at "
            f"{', '.join(sorted(places)) or 'none'}"
        )
    layers = sorted({layer for layer, _ in units})
    state: dict[str, Tensor] = {}
    for layer in layers:
        for group, unit in enumerate(used):
            if (layer, unit) not in units:
                raise ValueError(f"{path}: layer {layer} has no unit {unit}, which its positions need")
            own, what = units[layer, unit], f"unit {unit} of layer {layer}"
            W, b = take(path, own, {"learned_source.weight": 2, "learned_source.bias": 1}, what)
            place = f"interventions.{layer}.{group}"
            state |= {f"{place}.source.weight": W, f"{place}.source.bias": b}
            if "projection.weight" in own:
                state[f"{place}.projection.weight"] = own["projection.weight"]
                continue
            prefix = "projection.parametrizations.weight"
            # (r, d), (d, d)
            original, base = take(path, own, {f"{prefix}.original": 2, f"{prefix}.0.base": 2}, what)
            # 1/2 is the initial length of rows here
            state[f"{place}.basis"] = orthogonal_map(original.mT, base).mT / 2
    return layers, state


def _heads(base_model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """Return the tensors of the saved prediction head that differ from those of the base model."""
    path, saved = _read(folder, HEADS)
    own = {key: tensor.cpu() for key, tensor in base_model.state_dict().items() if key in saved}
    if strange := sorted(saved.keys() - own.keys()):
        raise ValueError(
            f"{path} is the head of a class in adapters, which {type(base_model).__name__} does not have "
            f"({', '.join(strange[:3])}): to leave it out, save the adapter with with_head=False"
        )
    trained = {
        name.rpartition(".")[0]
        for name, tensor in saved.items()
        if not torch.equal(tensor.to(own[name]), own[name])
    }
    return {name: tensor for name, tensor in saved.items() if name.rpartition(".")[0] in trained}


def _read(folder: Path, names: tuple[str, str]) -> tuple[Path | None, dict[str, Tensor]]:
    """Return the first of two files that exists, and its tensors."""
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        return None, {}
    return path, read_tensors(path) if path.suffix == ".safetensors" else read_pickled(path)
