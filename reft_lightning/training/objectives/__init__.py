"""What training minimises: one class an objective, chosen by ``objective`` of the configuration."""

from .base import SFT, DifferenceInMeans, Objective, inputs_of, log_probs, reference
from .preferences import DPO, RePS
from .reward import Reward

__all__ = [
    "DPO",
    "SFT",
    "DifferenceInMeans",
    "Objective",
    "RePS",
    "Reward",
    "inputs_of",
    "log_probs",
    "reference",
]
