"""Training that starts from a saved adapter instead of its method's initial values."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..storage.reading import read_json
from .adapted import AdaptedModel
from .baselines.in_place import InPlaceBaseline
from .baselines.joint import JointModel
from .baselines.peft import ADAPTER, PeftBaseline
from .hub import check_holds
from .methods import METHODS
from .reft.config import CONFIG_FILE
from .reft.model import ReftModel
from .saving import BASELINE_CONFIG_FILE, BESIDE, PEFT_CONFIG_FILE, check_fit, load_adapter, load_state

log = logging.getLogger(__name__)

FILES = {  # class -> the file its adapters are recognised by, and what they are
    ReftModel: (CONFIG_FILE, "interventions"),
    PeftBaseline: (PEFT_CONFIG_FILE, "a peft adapter"),
    InPlaceBaseline: (BASELINE_CONFIG_FILE, "parameters of the base model"),
}


def first_state(model: AdaptedModel, folder: Path) -> dict[str, Tensor]:
    """Read the saved adapter from which to start training another.

    A head that is missing from it, or has a different number of classes, is left out and starts as a new one. The model
    to train can be on the meta device.

    Raises:
        FileNotFoundError: if there is no adapter.
        ValueError: if it does not fit, or was trained with another method or other settings, naming each of them.
    """
    if differing := _differing(model, folder):
        raise ValueError(
            f"that adapter was trained with {', '.join(differing)}; set intervention to the settings it was trained "
            "with"
        )
    state, own = load_state(folder), model.adapter_state_dict()
    for head in model.config.heads:
        parts = {name for name in own if f".{head}." in f".{name}."}
        if any(name not in state or state[name].shape != own[name].shape for name in parts):
            log.info("the head %s starts as a new one: the adapter has none, or one for other classes", head)
            own = {name: tensor for name, tensor in own.items() if name not in parts}
            state = {name: tensor for name, tensor in state.items() if name not in parts}
    check_fit(own, state, f" {model.config.method}")
    return state


def _differing(model: Any, folder: Path) -> list[str]:
    """Return the settings in which a saved adapter differs from a model's, except those that only affect training."""
    file = next(file for kind, (file, _) in FILES.items() if isinstance(model, kind))
    there = [what for other, what in FILES.values() if (folder / other).is_file()]
    if there and not (folder / file).is_file():
        raise ValueError(f"the folder holds {there[0]}, but {model.config.method} is another method")
    check_holds(folder, file)
    if isinstance(model, ReftModel):
        saved = load_adapter(folder)[0]
        of_peft = (
            _differing(model.peft, folder / BESIDE) if isinstance(model, JointModel) and saved.beside else []
        )
        return replace(model.config, heads=saved.heads).differing(saved) + of_peft
    theirs = read_json(folder / file)
    if isinstance(model, PeftBaseline):
        method = METHODS[model.config.method]
        mine = model.peft_model.peft_config[ADAPTER].to_dict()
        options = [n for n in method.options() if not n.endswith("dropout") and not n.startswith("init_")]
        names = ["peft_type", *method.peft_fixed, *options]
    else:
        mine, names = vars(model.config), ["method"]
    pairs = {name: (_in_json(theirs.get(name)), _in_json(mine.get(name))) for name in names}
    return [f"{name} {one!r} instead of {other!r}" for name, (one, other) in pairs.items() if one != other]


def _in_json(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | list) else value
