"""Evaluation: generated text -> answer -> score, and the likelihoods of options."""

from .decoding import Decoding, generate
from .option_likelihood import log_likelihood, option_log_likelihoods, summed_log_p, with_draft
from .prefix_reader import ColumnReader, sources_in
from .row_metrics import MeanLoss, RowScores, mean_interval, pass_at_k, wilson_interval
from .sandbox.run import Limits, Outcome, run_program, run_programs
from .text_to_text import first_tokens, target_log_likelihood, write

__all__ = [
    "ColumnReader",
    "Decoding",
    "Limits",
    "MeanLoss",
    "Outcome",
    "RowScores",
    "first_tokens",
    "generate",
    "log_likelihood",
    "mean_interval",
    "option_log_likelihoods",
    "pass_at_k",
    "run_program",
    "run_programs",
    "sources_in",
    "summed_log_p",
    "target_log_likelihood",
    "wilson_interval",
    "with_draft",
    "write",
]
