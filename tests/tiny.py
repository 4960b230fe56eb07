"""Tiny random base models: one line a family, built once a process, copied for each test.

Weights are random and larger than a training start, so that an edit moves the logits and greedy ids differ
from one another. Dropout is 0: what a test compares would otherwise differ by chance.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    RobertaConfig,
)
from transformers.models.auto import AutoModelForCausalLM, AutoModelForSequenceClassification

from reft_lightning.base_models import reading

VOCABULARY, WIDTH, LAYERS, HEADS, LENGTH = 48, 16, 3, 2, 64
PAD, BOS, EOS = 0, 1, 2

# The names most families use for their sizes; GPT-2 and its kin have their own.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": LENGTH,
}
GPT_SIZES = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
GPT_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
OPT_SIZES = {k: v for k, v in SIZES.items() if k != "intermediate_size"}
FALCON_SIZES = {k: v for k, v in SIZES.items() if k not in ("intermediate_size", "max_position_embeddings")}

DECODERS: dict[str, Callable[..., PretrainedConfig]] = {
    "llama": functools.partial(LlamaConfig, **SIZES, **GROUPED),
    "qwen3": functools.partial(Qwen3Config, **SIZES, **GROUPED),
    "gemma3": functools.partial(Gemma3TextConfig, **SIZES, **GROUPED, query_pre_attn_scalar=8),
    "mistral": functools.partial(MistralConfig, **SIZES, **GROUPED, sliding_window=6),
    "gpt2": functools.partial(GPT2Config, **GPT_SIZES, **GPT_NO_DROPOUT),
    "gptj": functools.partial(GPTJConfig, **GPT_SIZES, **GPT_NO_DROPOUT, rotary_dim=4),
    "gpt_neox": functools.partial(GPTNeoXConfig, **SIZES),
    "opt": functools.partial(OPTConfig, **OPT_SIZES, ffn_dim=24, word_embed_proj_dim=WIDTH, dropout=0.0),
    "falcon": functools.partial(FalconConfig, **FALCON_SIZES, new_decoder_architecture=False),
}
ENCODERS: dict[str, Callable[..., PretrainedConfig]] = {
    "bert": functools.partial(BertConfig, **SIZES, **NO_DROPOUT),
    "roberta": functools.partial(RobertaConfig, **SIZES, **NO_DROPOUT),
}
FAMILIES = {**DECODERS, **ENCODERS}


@functools.cache
def original(family: str, **own: int) -> PreTrainedModel:
    """Return the one tiny model of a family, or of some sizes of its own, to be read only."""
    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    config = FAMILIES[family](**special, initializer_range=0.4, **own)
    auto = AutoModelForCausalLM if family in DECODERS else AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = auto.from_config(config).eval()
    if family in DECODERS:
        model.generation_config.eos_token_id = None  # rows of one length, unless a test asks for a stop
    return model


def model(family: str, dtype: torch.dtype = torch.float32, **own: int) -> PreTrainedModel:
    """Return a fresh copy of a family's tiny model, in eval mode."""
    return copied(original(family, **own)).to(dtype)


def copied(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy that reads rows as the model does: found out once, not for each copy."""
    again = copy.deepcopy(model)
    reading._found[again] = reading.reading_of(model)
    return again


def rows(*lengths: int, seed: int = 0) -> list[Tensor]:
    """Draw one row of ordinary tokens for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(EOS + 1, VOCABULARY, (n,), generator=generator) for n in lengths]


def padded(texts: list[Tensor], side: str = "right", extra: int = 0) -> dict[str, Tensor]:
    """Pad rows to their longest (and ``extra`` columns more) on one side: input_ids and attention_mask."""
    width = max(len(text) for text in texts) + extra
    ids, mask = torch.full((len(texts), width), PAD), torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        where = slice(0, len(text)) if side == "right" else slice(width - len(text), width)
        ids[row, where], mask[row, where] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def prompt_target(prompts: list[Tensor], targets: list[Tensor]) -> dict[str, Tensor]:
    """Lay rows out as prompt | target: prompts end, and targets start, in one column."""
    left, right = padded(prompts, "left"), padded(targets, "right")
    batch = {key: torch.cat([left[key], right[key]], 1) for key in left}
    target = torch.cat([torch.zeros_like(left["attention_mask"]), right["attention_mask"]], 1).bool()
    batch["labels"] = batch["input_ids"].masked_fill(~target, -100)
    batch["prompt_mask"] = batch["attention_mask"].bool() & ~target
    return batch


def each_with_some(families, with_all, positions):
    """Pairs: every family with the first two positions, some with all of them."""
    return [
        (family, at) for family in families for at in (positions if family in with_all else positions[:2])
    ]
