"""``reft-convert FOLDER``: convert an adapter from one library to another."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from ..adapters.adapt import build_on_meta
from ..adapters.reft.base_of import load_base_of, naming_base
from ..adapters.reft.config import CONFIG_FILE, ReftConfig, check_architecture
from ..adapters.reft.model import ReftModel
from ..adapters.saving import adapter_of, load_adapter, warn_of_half
from ..storage.reading import naming, read_json
from . import adapterhub, control_vector, easysteer, pyreft
from .foreign import check_not_joint, in_memory

log = logging.getLogger(__name__)

INSTEAD = "name another with base=, a folder or a name on the hub"

WRITERS = {
    "reft": lambda reft, out: reft.save_pretrained(out),
    "pyreft": pyreft.to_pyreft,
    "easysteer": easysteer.to_easysteer,
    "gguf": control_vector.to_gguf,
}
CHECKS = {  # checks that need only a configuration
    "pyreft": partial(check_not_joint, library="pyreft"),
    "easysteer": easysteer.check_config,
    "gguf": control_vector.check_config,
}


def main(
    folder: Path,
    to: str,
    out: Path,
    base: str | None = None,
    positions: str | None = None,
    act_fn: str | None = None,
    method: str | None = None,
) -> None:
    """Read an adapter of any supported library, and write it for another to an empty or new folder.

    `to` is a name in :data:`WRITERS`; `base` is the model it was trained on, if the adapter does not name it.
    `positions` and `act_fn` are for :func:`.pyreft.from_pyreft`, `method` for :func:`.adapterhub.from_adapters`.

    Raises:
        ValueError, OSError: if a folder or an argument is invalid, before the base model is loaded; or if the adapter
            cannot be read or written.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(
            f"out={out} is not empty, and its files would be mixed with the new ones: name a new folder"
        )
    folder = adapter_of(folder)
    library, named = _library(folder)
    given = {"positions": positions, "act_fn": act_fn, "method": method}
    takes = {"reft": (), "pyreft": ("positions", "act_fn"), "adapters": ("method",)}[library]
    for name, value in given.items():
        if value is not None and name not in takes:
            raise ValueError(
                f"{name}={value} does not apply to {folder}, an adapter of {library}: leave it out"
            )
    if library == "pyreft" and positions is None and pyreft.OURS not in read_json(folder / pyreft.CONFIG):
        raise ValueError(
            f"{folder}: pyreft does not save positions: add those used in training, such as positions=f7+l7"
        )
    if not (base or named):
        raise ValueError(
            f"{folder} does not name its base model: add base=NAME, a folder or a name on the hub"
        )
    if library == "reft":
        config, state = load_adapter(folder)
        if to in CHECKS:
            CHECKS[to](config)
        config = replace(config, base_model=base or named)
        if config.beside:
            reft = ReftModel.from_pretrained(load_base_of(config, instead=INSTEAD), folder)
        else:
            reft = _without_weights(config, folder, state)
    elif library == "pyreft":
        base_model = _base_model(base or named, weights=False)
        reft = pyreft.from_pyreft(base_model, folder, positions=positions, act_fn=act_fn)
    else:  # its saved heads are compared with the base model's
        headed = any((folder / name).is_file() for name in adapterhub.HEADS)
        reft = adapterhub.from_adapters(_base_model(base or named, weights=headed), folder, method=method)
    reft.config.base_model = base or named
    WRITERS[to](reft, out)
    log.info("converted %s, an adapter of %s, to %s in %s", folder, library, to, out)


def _library(folder: Path) -> tuple[str, str]:
    """Return the library that wrote a folder, and the base model that it names."""
    if (folder / CONFIG_FILE).is_file():
        return "reft", read_json(folder / CONFIG_FILE).get("base_model") or ""
    if (folder / adapterhub.CONFIG).is_file():
        return "adapters", read_json(folder / adapterhub.CONFIG).get("model_name") or ""
    if (folder / pyreft.CONFIG).is_file() and any(folder.glob("intkey_*.bin")):
        return "pyreft", read_json(folder / pyreft.CONFIG).get(pyreft.OURS, {}).get("base_model") or ""
    there = ", ".join(sorted(path.name for path in folder.iterdir())) or "no files"
    raise ValueError(
        f"{folder} does not hold an adapter of reft_lightning ({CONFIG_FILE}), adapters ({adapterhub.CONFIG}) or "
        f"pyreft ({pyreft.CONFIG} and intkey_*.bin); it has {there}"
    )


def _without_weights(config: ReftConfig, folder: Path, state: dict[str, Tensor]) -> ReftModel:
    """Return a saved adapter on its base model without weights."""
    base_model: Any = load_base_of(config, instead=INSTEAD, weights=False)
    heads = [t for name, t in state.items() if name.startswith("heads.") and t.is_floating_point()]
    if heads:  # which are written as they were saved
        base_model.to(max(heads, key=lambda t: t.itemsize).dtype)
    with naming(folder):
        check_architecture(base_model, config.architecture)
        reft = in_memory(ReftModel(base_model, config))
        reft.load_adapter_state_dict(state)
        for name, rows in config.partitions.items():
            reft.add_partition(name, rows)
    warn_of_half(folder, None)
    return reft.eval()


def _base_model(name: str, weights: bool) -> PreTrainedModel:
    """Return the base model of another library's adapter; without weights, it is on the meta device."""
    with naming_base(name, INSTEAD):
        config = AutoConfig.from_pretrained(name)
        classifies = str((config.architectures or [""])[0]).endswith("ForSequenceClassification")
        on_meta = build_on_meta(config, "sequence_classification" if classifies else "causal_lm")
        return type(on_meta).from_pretrained(name) if weights else on_meta
