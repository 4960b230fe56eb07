"""Recognise the weights of a base model, wherever they come from."""

from __future__ import annotations

import hashlib

import torch
from transformers import PreTrainedModel

from .heads import POOLER

VALUES = 16  # read from each parameter, at equal distances


def fingerprint_of(model: PreTrainedModel) -> str | None:
    """Return a short digest of the weights of a model; None if they are quantized or offloaded.

    It does not depend on the dtype that a checkpoint is loaded in, the device, or the parameters' names. Head and
    pooler, which may be new, do not count. Finetuning changes it.
    """
    parts = []
    for name, parameter in model.base_model.named_parameters():
        if name.startswith(f"{POOLER}."):
            continue
        plain = type(parameter) is torch.nn.Parameter and parameter.is_floating_point()
        if parameter.is_meta or not plain:
            return None
        values = parameter.detach().reshape(-1)
        some = values[:: max(values.numel() // VALUES, 1)].to(torch.bfloat16).cpu()
        parts.append(str(tuple(parameter.shape)).encode() + some.view(torch.int16).numpy().tobytes())
    return hashlib.sha256(b"".join(sorted(parts))).hexdigest()[:16]
