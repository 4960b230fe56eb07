"""Evaluation: generated text -> answer -> score, and the likelihood of options."""

from .decoding import generate_greedily, option_log_likelihoods
from .metrics import ExactMatch, MeanLoss, wilson_interval

__all__ = [
    "ExactMatch",
    "MeanLoss",
    "generate_greedily",
    "option_log_likelihoods",
    "wilson_interval",
]
