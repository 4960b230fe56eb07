"""Training that begins with a saved adapter instead of the first values of its method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..storage.reading import read_json
from .adapted import AdaptedModel
from .baselines.joint import JointModel
from .baselines.peft import ADAPTER, PeftBaseline
from .hub import check_holds
from .methods import METHODS
from .reft.model import ReftModel
from .saving import BASELINE_CONFIG_FILE, BESIDE, PEFT_CONFIG_FILE, check_fit, load_adapter, load_state


def first_state(model: AdaptedModel, folder: Path) -> dict[str, Tensor]:
    """Read the saved adapter that the training of another one begins with.

    Args:
        model: what is to be trained; it needs no weights.
        folder: of the adapter, as :func:`~reft_lightning.adapters.saving.load_saved` takes it.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it was trained with another method or other settings, each of which is named, or does not fit.
    """
    if differing := _differing(model, folder):
        raise ValueError(
            f"that adapter was trained with {', '.join(differing)}; give intervention the settings that it was trained "
            "with"
        )
    state = load_state(folder)
    check_fit(model.adapter_state_dict(), state, f" {model.config.method}")
    return state


def _differing(model: Any, folder: Path) -> list[str]:
    """Return in what a saved adapter differs from a model's, but for numbers and what matters in training only."""
    if isinstance(model, JointModel):
        return _differing(model.reft, folder) + _differing(model.peft, folder / BESIDE)
    if isinstance(model, ReftModel):
        return model.config.differing(load_adapter(folder)[0])
    if isinstance(model, PeftBaseline):
        check_holds(folder, PEFT_CONFIG_FILE)
        method = METHODS[model.config.method]
        mine, theirs = model.peft_model.peft_config[ADAPTER].to_dict(), read_json(folder / PEFT_CONFIG_FILE)
        names = [
            name for name in method.options() if not name.endswith("dropout") and not name.startswith("init_")
        ]
        names = ["peft_type", *method.peft_fixed, *names]
    else:
        check_holds(folder, BASELINE_CONFIG_FILE)
        mine, theirs = vars(model.config), read_json(folder / BASELINE_CONFIG_FILE)
        names = ["method", "heads"]
    return [
        f"{name} {theirs.get(name)!r} instead of {mine.get(name)!r}"
        for name in names
        if _in_json(mine.get(name)) != _in_json(theirs.get(name))
    ]


def _in_json(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | list) else value
