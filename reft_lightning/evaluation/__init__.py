"""Evaluation: generated text -> answer -> score, and the likelihood of options."""

from .decoding import Decoding, generate
from .execute import Limits, Outcome, run_program, run_programs
from .metrics import MeanLoss, RowScores, mean_interval, wilson_interval
from .options import log_likelihood, option_log_likelihoods, with_draft
from .pass_rate import pass_at_k
from .shared_columns import ColumnReader

__all__ = [
    "ColumnReader",
    "Decoding",
    "Limits",
    "MeanLoss",
    "Outcome",
    "RowScores",
    "generate",
    "log_likelihood",
    "mean_interval",
    "option_log_likelihoods",
    "pass_at_k",
    "run_program",
    "run_programs",
    "wilson_interval",
    "with_draft",
]
