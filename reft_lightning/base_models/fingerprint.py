"""Recognise the weights of a base model, wherever they come from."""

from __future__ import annotations

import hashlib

import torch
from transformers import PreTrainedModel

VALUES = 16  # read from each parameter, at equal distances


def fingerprint_of(model: PreTrainedModel) -> str | None:
    """Return a short digest of the weights of a model, without its head; None if they are quantized or offloaded.

    It does not depend on the dtype that a checkpoint is loaded in, the device, or the parameters' names. Finetuning
    changes it.
    """
    parts = []
    for parameter in model.base_model.parameters():
        if (
            parameter.is_meta
            or type(parameter) is not torch.nn.Parameter
            or not parameter.is_floating_point()
        ):
            return None
        values = parameter.detach().reshape(-1)
        some = values[:: max(values.numel() // VALUES, 1)].to(torch.bfloat16).cpu()
        parts.append(str(tuple(parameter.shape)).encode() + some.view(torch.int16).numpy().tobytes())
    return hashlib.sha256(b"".join(sorted(parts))).hexdigest()[:16]
