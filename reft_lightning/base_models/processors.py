"""Processors of models that read images: a tokenizer together with what makes numbers of pictures."""

from __future__ import annotations

from typing import Any

from transformers import AutoProcessor, PretrainedConfig, ProcessorMixin

from .loading import BYTES, byte_tokenizer, with_pad_token
from .places import ModelPlace

# LLaVA-1.5's form of a question, for messages in parts
CHAT = (
    "{% for message in messages %}{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' if message['role'] == "
    "'assistant' else '' }}{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else "
    "part['text'] }}{% endfor %}{{ ' ' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)


def load_processor(
    hf_config: PretrainedConfig, *, tokenizer: str | None = None, **place: Any
) -> ProcessorMixin:
    """Return the processor of a model that reads images, its tokenizer with a pad token.

    Raises:
        OSError: if it cannot be found; says what to do.
        ValueError: if the model has none for images, or a random one is no LLaVA over bytes.
    """
    lies = ModelPlace(**place)
    if lies.source == "random":
        return _byte_processor(hf_config, tokenizer)
    if tokenizer is not None:
        raise ValueError(
            f"model.tokenizer={tokenizer}: a model that reads images has a processor with a tokenizer of its own; "
            "leave it out"
        )
    where = lies.folder()
    try:
        loaded = AutoProcessor.from_pretrained(where, revision=lies.revision, trust_remote_code=False)
    except ImportError as error:
        raise ValueError(
            f"the processor of {where} needs a package more: pip install 'reft_lightning[vision]' ({error})"
        ) from error
    except (OSError, ValueError) as error:
        raise OSError(f"no processor of {where} was found: {error}") from error
    if not hasattr(loaded, "image_processor"):
        raise ValueError(f"{where} has no processor of images, but a {type(loaded).__name__}")
    with_pad_token(loaded.tokenizer, where)
    return loaded


def _byte_processor(config: PretrainedConfig, tokenizer: str | None) -> ProcessorMixin:
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    if config.model_type != "llava" or tokenizer != BYTES:
        raise ValueError(
            "a random model that reads images must be a llava with tokenizer=bytes, for which a processor is made; "
            f"got {config.model_type} with tokenizer={tokenizer}"
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
