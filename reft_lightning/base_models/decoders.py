"""Which models are decoders."""

from __future__ import annotations

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING


def is_decoder(config: PretrainedConfig) -> bool:
    """Whether each token attends only to earlier tokens, so that the model can generate text."""
    # Pegasus is listed as a causal model, but only its decoder is one
    if config.is_encoder_decoder:
        return False
    # BERT and similar models are decoders only if their configuration says so
    told = type(config) not in MODEL_FOR_MASKED_LM_MAPPING or getattr(config, "is_decoder", False)
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and bool(told)
