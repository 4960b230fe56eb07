"""reft_lightning: Representation Finetuning (ReFT, arXiv:2404.03592) of frozen language models."""

from .checkpoint import ReftConfig
from .interventions import (
    INTERVENTIONS,
    ConsReFT,
    DiReFT,
    Intervention,
    LobiReFT,
    LoReFT,
    NoReFT,
    OrthonormalDiReFT,
)
from .model import ParameterCount, ReftModel, attach, count_parameters
from .positions import parse_positions

__version__ = "0.1.0"

__all__ = [
    "INTERVENTIONS",
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
    "parse_positions",
]
