"""Interventions Phi: one class per formula, and a table from names to classes."""

from .attention_heads import JoLA, LoFiT
from .base import (
    INTERVENTIONS,
    Intervention,
    check_settings,
    intervention_class,
    method_name,
    registered,
    settings_of,
)
from .elementwise import RED, ActivationScaling, Bias
from .interchange import CDAS, DAS, BoundlessDAS
from .orthonormal import orthonormal_rows
from .rows import Found, Tokens
from .steering import CAST, MeanDifference, ReFTr1
from .subspace import (
    ConsReFT,
    DiReFT,
    LobiReFT,
    LoReFT,
    NoReFT,
    Orthonormal,
    OrthonormalDiReFT,
    Partition,
    Subspace,
    lend,
    rotations,
)

__all__ = [
    "CAST",
    "CDAS",
    "DAS",
    "INTERVENTIONS",
    "RED",
    "ActivationScaling",
    "Bias",
    "BoundlessDAS",
    "ConsReFT",
    "DiReFT",
    "Found",
    "Intervention",
    "JoLA",
    "LoFiT",
    "LoReFT",
    "LobiReFT",
    "MeanDifference",
    "NoReFT",
    "Orthonormal",
    "OrthonormalDiReFT",
    "Partition",
    "ReFTr1",
    "Subspace",
    "Tokens",
    "check_settings",
    "intervention_class",
    "lend",
    "method_name",
    "orthonormal_rows",
    "registered",
    "rotations",
    "settings_of",
]
