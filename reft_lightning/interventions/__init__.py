"""Interventions Phi: one class a formula, one table from names to classes."""

from .base import (
    INTERVENTIONS,
    Intervention,
    check_settings,
    intervention_class,
    method_name,
    registered,
    settings_of,
)
from .elementwise import RED, Bias
from .orthonormal import orthonormal_rows
from .rows import Found, Tokens
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
    "INTERVENTIONS",
    "RED",
    "Bias",
    "ConsReFT",
    "DiReFT",
    "Found",
    "Intervention",
    "LoReFT",
    "LobiReFT",
    "NoReFT",
    "Orthonormal",
    "OrthonormalDiReFT",
    "Partition",
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
