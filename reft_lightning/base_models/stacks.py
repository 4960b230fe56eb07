"""The stacks of a model, each of which reads its own tokens: one, or an encoder (prompt) and a decoder (answer)."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

WHOLE, ENCODER, DECODER = "", "encoder", "decoder"


def stacks_of(model: PreTrainedModel) -> dict[str, str]:
    """Return the path of each stack: ``encoder`` and ``decoder`` for T5 and similar models, else ``{"": ""}``."""
    if not model.config.is_encoder_decoder:
        return {WHOLE: ""}
    encoder, decoder = model.get_encoder(), model.get_decoder()
    # models that read images call their whole language model the decoder
    if decoder is not model and any(part is encoder for part in decoder.modules()):
        decoder = decoder.get_decoder()
    found = {ENCODER: encoder, DECODER: decoder}
    if any(part is model for part in found.values()):  # only one of the two
        return {WHOLE: ""}
    paths = {id(module): path for path, module in model.named_modules()}
    return {stack: paths[id(part)] for stack, part in found.items()}


def reads_two_texts(model: PreTrainedModel) -> bool:
    """Whether a model has an encoder and a decoder, which read different tokens."""
    return len(stacks_of(model)) > 1


def config_of_stack(model: PreTrainedModel, stack: str = WHOLE) -> PretrainedConfig:
    """Return the configuration of a stack, with its numbers of layers and heads; by default, the encoder's of two."""
    stacks = stacks_of(model)
    if len(stacks) == 1:
        return model.config.get_text_config()
    stack = stack or ENCODER
    part: Any = model.get_submodule(stacks[stack])  # has no configuration in FSMT
    return getattr(part, "config", model.config).get_text_config(**{stack: True})
