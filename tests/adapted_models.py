"""Baselines of tiny models."""

import tiny
import torch

from reft_lightning.adapters.adapt import adapt
from reft_lightning.adapters.methods import METHODS

# Sizes that fit models of width 16.
OPTIONS = {
    "peft/road": {"group_size": 4},
    "peft/oft": {"oft_block_size": 4},
    "peft/vera": {"r": 4},
    "peft/prefix_tuning": {"num_virtual_tokens": 3},
    "peft/prompt_tuning": {"num_virtual_tokens": 3},
}
PEFT = [name for name, method in METHODS.items() if method.peft]
VIRTUAL = [name for name, method in METHODS.items() if method.virtual_tokens]
JOINT = [name for name, method in METHODS.items() if method.joins]
DECODERS = [("llama", method) for method in [*PEFT, "full", "frozen"]] + [("gpt2", "bitfit")]
ENCODERS = [("bert", m) for m in [*PEFT, "full", "bitfit"] if m != "peft/prefix_tuning"]
ALL = DECODERS + ENCODERS


def adapted(family, method, moved=True, seed=0, dtype=torch.float32, **options):
    """Return a baseline of a tiny model; ``moved`` away from the base, as training does."""
    torch.manual_seed(seed)
    heads = "auto" if family in tiny.ENCODERS and method != "frozen" else ()
    model = adapt(tiny.model(family, dtype), method, heads=heads, **OPTIONS.get(method, {}) | options).eval()
    if moved:
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model
