"""reft_lightning: Representation Finetuning (ReFT, arXiv:2404.03592) of frozen language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters.adapt import count_parameters
    from .adapters.adapted import ParameterCount
    from .adapters.reft.attach import attach
    from .adapters.reft.config import ReftConfig
    from .adapters.reft.model import ReftModel
    from .adapters.reft.positions import parse_positions
    from .config.models import load_model
    from .exchange.adapterhub import from_adapters
    from .exchange.control_vector import to_gguf
    from .exchange.easysteer import to_easysteer
    from .exchange.lora import to_lora
    from .exchange.merge import merge
    from .exchange.pyreft import from_pyreft, to_pyreft
    from .interventions import (
        INTERVENTIONS,
        RED,
        Bias,
        ConsReFT,
        DiReFT,
        Intervention,
        LobiReFT,
        LoReFT,
        NoReFT,
        OrthonormalDiReFT,
    )

__version__ = "0.1.0"

# Public names are imported on first use: a typo on the command line is reported before torch is imported.
_HOME = {
    "INTERVENTIONS": ".interventions",
    "RED": ".interventions",
    "Bias": ".interventions",
    "ConsReFT": ".interventions",
    "DiReFT": ".interventions",
    "Intervention": ".interventions",
    "LoReFT": ".interventions",
    "LobiReFT": ".interventions",
    "NoReFT": ".interventions",
    "OrthonormalDiReFT": ".interventions",
    "ParameterCount": ".adapters.adapted",
    "ReftConfig": ".adapters.reft.config",
    "ReftModel": ".adapters.reft.model",
    "attach": ".adapters.reft.attach",
    "count_parameters": ".adapters.adapt",
    "from_adapters": ".exchange.adapterhub",
    "from_pyreft": ".exchange.pyreft",
    "load_model": ".config.models",
    "merge": ".exchange.merge",
    "parse_positions": ".adapters.reft.positions",
    "to_easysteer": ".exchange.easysteer",
    "to_gguf": ".exchange.control_vector",
    "to_lora": ".exchange.lora",
    "to_pyreft": ".exchange.pyreft",
}

__all__ = [
    "INTERVENTIONS",
    "RED",
    "Bias",
    "ConsReFT",
    "DiReFT",
    "Intervention",
    "LoReFT",
    "LobiReFT",
    "NoReFT",
    "OrthonormalDiReFT",
    "ParameterCount",
    "ReftConfig",
    "ReftModel",
    "attach",
    "count_parameters",
    "from_adapters",
    "from_pyreft",
    "load_model",
    "merge",
    "parse_positions",
    "to_easysteer",
    "to_gguf",
    "to_lora",
    "to_pyreft",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
