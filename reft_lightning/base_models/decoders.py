"""Which models are decoders."""

from __future__ import annotations

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING


def is_decoder(config: PretrainedConfig) -> bool:
    """Whether each token of a model reads only the tokens before it, so that the model can generate text."""
    # the configuration of Pegasus, of which its decoder alone is a causal model, says so too
    if config.is_encoder_decoder:
        return False
    # BERT and similar models are decoders where they are told so
    told = type(config) not in MODEL_FOR_MASKED_LM_MAPPING or getattr(config, "is_decoder", False)
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and bool(told)
