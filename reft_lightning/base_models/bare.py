"""A copy of a model to try something on: it shares the weights, and leaves no trace in the model itself.

Hooks, replaced ``forward`` methods, the mode of training and what a model notes of its last call stay out of it.
"""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel


def bare_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the same class and configuration, in eval mode, with the same weights and no memory of its own.

    Raises:
        Exception: what torch or transformers raise if modules were changed after the model was made (adapters, some
            quantizations), or if its class takes more than a configuration.
    """
    with torch.device("meta"):
        bare = type(model)(copy.deepcopy(model.config))
    bare.load_state_dict(model.state_dict(), assign=True)
    for path, buffer in model.named_buffers():  # those that no state dict holds too: RoPE's frequencies
        parent, _, name = path.rpartition(".")
        setattr(bare.get_submodule(parent), name, buffer)
    for path, module in model.named_modules():  # what makes some decoders read both ways
        if hasattr(module, "is_causal"):
            bare.get_submodule(path).is_causal = module.is_causal
    return bare.eval()
