"""A frozen base in 8 or 4 bits (transformers' ``quantization_config``), tested before any of its weights are read.

An installed library is not enough: some formats need a GPU, and the products of some pass no gradient to their input,
so nothing below them would learn.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.quantizers.auto import AutoQuantizationConfig

from ..suggest import did_you_mean
from .loading_bars import bars_of_transformers

_TRIED = LlamaConfig(
    vocab_size=8,
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=2,
    head_dim=64,
)


def check_quantization(settings: Mapping[str, Any]) -> None:
    """Quantize a one-block model, backpropagate through it, and reject settings if either step fails."""
    if not settings:
        return
    try:
        kind = type(AutoQuantizationConfig.from_dict(dict(settings)))
        known = [*inspect.signature(kind.__init__).parameters, "quant_method"]
        if unknown := next((name for name in settings if name not in known), None):
            raise ValueError(f"{kind.__name__} has no setting {unknown}{did_you_mean(unknown, known)}")
        _try(settings)
    except Exception as error:  # a quantization library can raise anything
        raise ValueError(f"model.quantization={dict(settings)}: {error or type(error).__name__}") from error


def _try(settings: Mapping[str, Any]) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        bars_of_transformers(wanted=False),
        torch.random.fork_rng(devices=[]),
    ):
        LlamaForCausalLM(_TRIED).save_pretrained(folder)
        model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **quantizing(settings))
    block = model.model.layers[0].mlp.requires_grad_(False)
    h = torch.ones(1, 2, 128, dtype=torch.bfloat16, device=model.device, requires_grad=True)
    out = block(h)
    if not out.requires_grad:
        raise ValueError("its products pass no gradient to their input, so nothing below them could learn")
    out.sum().backward()


def quantizing(settings: Mapping[str, Any], device_map: Any = None) -> dict[str, Any]:
    """Return the arguments for ``from_pretrained``; if there is a GPU, weights are quantized on it."""
    if device_map is None and torch.cuda.is_available():
        device_map = {"": torch.cuda.current_device()}
    return {"quantization_config": dict(settings), "device_map": device_map}


def is_quantized(module: nn.Module) -> bool:
    """Whether a module has weights in a quantization library's own type."""
    return any(type(parameter) is not nn.Parameter for parameter in module.parameters())


def keep_gradients(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights for CPUs that multiply in bfloat16, and unpack what is packed.

    bitsandbytes 0.50 packs a weight when it is first used in eval mode without gradients, as in validation. A packed
    weight passes no gradient to its input: parameters below it would stop learning, with at most a warning.
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False
            module.state_dict()  # unpacks
