"""A copy of a model for experiments: it shares the weights and leaves the model itself unchanged.

Hooks, replaced ``forward`` methods, the training mode and state kept from the last call are not copied.
"""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel


def bare_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the same class and configuration in eval mode, sharing the weights' memory.

    Raises:
        Exception: any error of torch or transformers, if modules were changed after the model was created (adapters,
            some quantizations), or its class needs more than a configuration.
    """
    with torch.device("meta"):
        bare = type(model)(copy.deepcopy(model.config))
    bare.load_state_dict(model.state_dict(), assign=True)
    for path, buffer in model.named_buffers():  # including those outside the state dict: RoPE's frequencies
        parent, _, name = path.rpartition(".")
        setattr(bare.get_submodule(parent), name, buffer)
    for path, module in model.named_modules():  # makes some decoders bidirectional
        if hasattr(module, "is_causal"):
            bare.get_submodule(path).is_causal = module.is_causal
    return bare.eval()
