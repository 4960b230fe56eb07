"""Processors of models that read images: a tokenizer and an image processor."""

from __future__ import annotations

from typing import Any

from transformers import AutoProcessor, PretrainedConfig, ProcessorMixin

from .loading import BYTES, byte_tokenizer, reading, with_pad_token
from .places import ModelPlace

# LLaVA-1.5's prompt format, for messages in parts
CHAT = (
    "{% for message in messages %}{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' if message['role'] == "
    "'assistant' else '' }}{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else "
    "part['text'] }}{% endfor %}{{ ' ' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)


def load_processor(
    hf_config: PretrainedConfig, *, tokenizer: str | None = None, **place: Any
) -> ProcessorMixin:
    """Return the processor of a model that reads images, with a pad token in its tokenizer.

    Raises:
        OSError: if it cannot be found; the message says what to do.
        ValueError: if the model has no image processor, or a random model is not a byte-level LLaVA.
    """
    located = ModelPlace(**place)
    if located.source == "random":
        return _byte_processor(hf_config, tokenizer)
    if tokenizer is not None:
        raise ValueError(
            f"model.tokenizer={tokenizer}: a model that reads images has a processor with its own tokenizer; leave it "
            "out"
        )
    where = located.folder()
    try:
        with reading("the processor", where):
            loaded = AutoProcessor.from_pretrained(where, revision=located.revision, trust_remote_code=False)
    except ImportError as error:
        raise ValueError(
            f"the processor of {where} needs another package: pip install 'reft_lightning[vision]' ({error})"
        ) from error
    if not hasattr(loaded, "image_processor"):
        raise ValueError(f"{where} has no image processor, but a {type(loaded).__name__}")
    with_pad_token(loaded.tokenizer, where)
    return loaded


def _byte_processor(config: PretrainedConfig, tokenizer: str | None) -> ProcessorMixin:
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    if config.model_type != "llava" or tokenizer != BYTES:
        raise ValueError(
            "a random model that reads images must be a llava with tokenizer=bytes; got "
            f"{config.model_type} with tokenizer={tokenizer}"
        )
    vision, letters = config.vision_config, byte_tokenizer()
    letters.add_special_tokens({"extra_special_tokens": ["<image>"]})
    side = {"height": vision.image_size, "width": vision.image_size}
    return LlavaProcessor(
        CLIPImageProcessorPil(size=side, crop_size=side),
        letters,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # CLIP's class token
        chat_template=CHAT,
    )
