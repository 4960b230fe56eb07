"""What training minimises: one class per objective, selected by ``objective`` in the configuration."""

from .base import SFT, DifferenceInMeans, Objective, inputs_of, log_probs, reference
from .interchange import CDAS, Interchange
from .preferences import DPO, RePS
from .reward import Reward

__all__ = [
    "CDAS",
    "DPO",
    "SFT",
    "DifferenceInMeans",
    "Interchange",
    "Objective",
    "RePS",
    "Reward",
    "inputs_of",
    "log_probs",
    "reference",
]
