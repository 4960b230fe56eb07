"""Adapted models of tiny base models: ReFT, each baseline, and both together."""

import tiny
import torch
from transformers import LlamaConfig

from reft_lightning.adapters.adapt import adapt
from reft_lightning.adapters.methods import METHODS, method_named

LLAMA_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
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
# one of each kind: matrices in maps, vectors, virtual tokens, the base model's own parameters
ENCODERS = [("bert", m) for m in ("peft/lora", "peft/ia3", "peft/prompt_tuning", "full", "bitfit")]
ALL = DECODERS + ENCODERS
REFT = [("llama", method) for method in ("loreft", "direft", "red")]
REFT += [("gpt2", "loreft"), ("bert", "loreft"), ("bert", "none")]
TOGETHER = [("llama", "loreft + peft/lora"), ("llama", "loreft + peft/ia3"), ("bert", "loreft + peft/lora")]
EVERY = REFT + ALL + TOGETHER


def arguments(family, method, **settings):
    """Return the arguments of :func:`adapt`; ``loreft + peft/lora`` trains both together."""
    name, _, beside = method.partition(" + ")
    known = method_named(name)
    found = {"heads": "auto" if family in tiny.ENCODERS and known.trains_heads else ()}
    found |= OPTIONS.get(name, {})
    if known.takes_settings:
        found |= {"positions": "f1+l1"} | ({} if name == "red" else {"rank": 2})
    if beside:
        found |= {"beside": beside, "beside_options": OPTIONS.get(beside, {})}
    return {"method": name} | found | settings


def adapted(family, method, moved=True, seed=0, dtype=torch.float32, base=None, **settings):
    """Return an adapted tiny model; ``moved`` away from the base, as training does."""
    torch.manual_seed(seed)
    model = adapt(base or tiny.model(family, dtype), **arguments(family, method, **settings)).eval()
    if moved:
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def state_of(model):
    """Return all of a model that attaching could change: modules, hooks, modes, what learns, settings."""
    return (
        {
            name: {
                key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()
            }
            for name, module in model.named_modules()
        },
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        model.config.to_dict(),
    )


def batch_of(family):
    """Return rows of several lengths, padded as models of the family are read."""
    return tiny.padded(tiny.rows(5, 2, 7), "right" if family in tiny.ENCODERS else "left")


def logits_of(model, batch):
    with torch.no_grad():
        return model(**batch).logits
