"""The parts of a model that read tokens of their own: one, or an encoder of the prompt and a decoder of the answer."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

WHOLE, ENCODER, DECODER = "", "encoder", "decoder"


def stacks_of(model: PreTrainedModel) -> dict[str, str]:
    """Return the path of each stack: of T5 and the like those of ``encoder`` and ``decoder``, else ``{"": ""}``."""
    if not model.config.is_encoder_decoder:
        return {WHOLE: ""}
    encoder, decoder = model.get_encoder(), model.get_decoder()
    # what reads images calls all of its language model the decoder
    if decoder is not model and any(part is encoder for part in decoder.modules()):
        decoder = decoder.get_decoder()
    found = {ENCODER: encoder, DECODER: decoder}
    if any(part is model for part in found.values()):  # one of the two by itself
        return {WHOLE: ""}
    paths = {id(module): path for path, module in model.named_modules()}
    return {stack: paths[id(part)] for stack, part in found.items()}


def reads_two_texts(model: PreTrainedModel) -> bool:
    """Whether a model has an encoder and a decoder, whose tokens differ."""
    return len(stacks_of(model)) > 1


def config_of_stack(model: PreTrainedModel, stack: str = WHOLE) -> PretrainedConfig:
    """Return the configuration of a stack, with its own numbers of layers and heads; of two, the encoder's for none."""
    stacks = stacks_of(model)
    if len(stacks) == 1:
        return model.config.get_text_config()
    stack = stack or ENCODER
    part: Any = model.get_submodule(stacks[stack])  # of FSMT without a configuration
    return getattr(part, "config", model.config).get_text_config(**{stack: True})
