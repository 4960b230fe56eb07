"""Evaluation: generated text -> answer -> score, and the likelihood of options."""

from .decoding import Decoding, generate, option_log_likelihoods
from .execute import Limits, Outcome, run_program, run_programs
from .metrics import MeanLoss, RowScores, mean_interval, wilson_interval
from .pass_rate import pass_at_k

__all__ = [
    "Decoding",
    "Limits",
    "MeanLoss",
    "Outcome",
    "RowScores",
    "generate",
    "mean_interval",
    "option_log_likelihoods",
    "pass_at_k",
    "run_program",
    "run_programs",
    "wilson_interval",
]
