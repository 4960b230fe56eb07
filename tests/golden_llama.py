"""The small Llama of the golden files, on which pyreft and adapters computed what tests compare with."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

GOLDEN = Path(__file__).parent / "golden"


@functools.cache
def _original():
    model = LlamaForCausalLM(
        LlamaConfig(**json.loads((GOLDEN / "pyreft.json").read_text())["base_config"])
    ).eval()
    weights = load_file(GOLDEN / "pyreft.safetensors")
    weights = {name.removeprefix("base/"): t for name, t in weights.items() if name.startswith("base/")}
    model.load_state_dict(weights, strict=False)  # the head is tied to the embeddings
    return model


def base_model(dtype=torch.float32) -> Any:
    """Return a fresh copy, in eval mode."""
    return copy.deepcopy(_original()).to(dtype)
