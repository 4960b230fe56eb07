"""The model that a benchmark runs: a folder that is given, or random weights of a known shape."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
# Llama 3.2 1B and Llama 3 8B
LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}


@contextmanager
def model_folder(args: argparse.Namespace, shape: dict[str, Any] | None = None) -> Iterator[str]:
    """Yield the folder of the model that ``--model`` or ``--random`` asks for.

    Random weights are written once, so that every variant reads the same, and removed afterwards.
    """
    if not args.random:
        yield str(args.model)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**(shape or SMOLLM2_135M))).save_pretrained(folder)
        yield folder


def vocabulary_of(folder: str) -> int:
    """Return the number of tokens of a model."""
    return AutoConfig.from_pretrained(folder, local_files_only=True).vocab_size
