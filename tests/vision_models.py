"""Nine tiny random models that read images and text, built once a process, and batches for them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import tiny
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from reft_lightning.base_models.loading import byte_tokenizer

PAD, BOS, EOS = 0, 1, 2
BOI, EOI, IMAGE, VIDEO = 118, 119, 120, 121
VOCABULARY, WIDTH, TOWER, LAYERS = 128, 32, 16, 2
IMAGE_TOKENS = 4  # of one image, in every model

TEXT = {
    "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 256, "pad_token_id": PAD,
    "bos_token_id": BOS, "eos_token_id": EOS, "initializer_range": 0.3,
}  # fmt: skip
SEEN = {
    "hidden_size": TOWER, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
ROPE_3D = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
QWEN_VISION = {
    "depth": 3,
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": BOI,
    "vision_end_token_id": EOI,
}
QWEN_WIDTHS = {"hidden_size": TOWER, "out_hidden_size": WIDTH, "intermediate_size": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": TEXT | {"model_type": "llama"}, "image_token_index": IMAGE,
        "vision_config": SEEN | {"model_type": "clip_vision_model", "projection_dim": 16},
    },
    "qwen2_vl": QWEN_IDS | {
        "text_config": TEXT | ROPE_3D,
        "vision_config": QWEN_VISION | {"embed_dim": TOWER, "hidden_size": WIDTH, "mlp_ratio": 2, "in_channels": 3},
    },
    "qwen2_5_vl": QWEN_IDS | {
        "text_config": TEXT | ROPE_3D,
        "vision_config": QWEN_VISION | QWEN_WIDTHS
        | {"window_size": 56, "fullatt_block_indexes": [1], "in_chans": 3},
    },
    "qwen3_vl": QWEN_IDS | {
        "text_config": TEXT | ROPE_3D | {"head_dim": 8},
        "vision_config": QWEN_VISION | QWEN_WIDTHS
        | {"in_channels": 3, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    },
    "smolvlm": {
        "text_config": TEXT | {"model_type": "llama"}, "vision_config": SEEN | {"image_size": 56},
        "image_token_id": IMAGE, "scale_factor": 2,
    },
    "idefics3": {
        "text_config": TEXT | {"model_type": "llama"}, "vision_config": SEEN | {"image_size": 56},
        "image_token_id": IMAGE, "scale_factor": 2,
    },
    "paligemma": {
        "text_config": TEXT | {"model_type": "gemma", "head_dim": 8}, "image_token_index": IMAGE,
        "vision_config": SEEN | {"model_type": "siglip_vision_model", "projection_dim": WIDTH, "num_image_tokens": 4},
        "projection_dim": WIDTH, "hidden_size": WIDTH,
    },
    "gemma3": {
        "text_config": TEXT | {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8},
        "vision_config": SEEN | {"model_type": "siglip_vision_model"}, "mm_tokens_per_image": IMAGE_TOKENS,
        "image_token_index": IMAGE, "boi_token_index": BOI, "eoi_token_index": EOI,
    },
    "internvl": {
        "text_config": TEXT | {"model_type": "qwen2"}, "image_token_id": IMAGE, "downsample_ratio": 0.5,
        "vision_config": {**SEEN, "image_size": [28, 28], "patch_size": [7, 7]},
    },
}  # fmt: skip
NAMES = list(CONFIGS)


@functools.cache
def _original(name: str) -> PreTrainedModel:
    config = AutoConfig.for_model(name, **copy.deepcopy(CONFIGS[name]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForImageTextToText.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():  # Gemma3's connector, which would hide all images
                torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = None  # rows of one length
    return model


def model(name: str) -> PreTrainedModel:
    """Return a fresh copy of a tiny model, in eval mode."""
    return tiny.copied(_original(name))


def batch(
    name: str,
    texts: Sequence[tuple[int, int]] = ((5, 1), (3, 0), (4, 2)),
    targets: Tensor | None = None,  # (b, t)
    side: str = "left",
    extra: int = 0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return a batch of prompts: (tokens of text, images) of each row, the images after the first token.

    Args:
        name: of the model.
        texts: one pair a row.
        targets: tokens after the prompts, with labels and a prompt mask.
        side: of the padding.
        extra: columns of padding in addition.
        seed: of texts and images: a row of a batch is the same one in any other.
    """
    rows, pictures = [], []
    for number, (words, images) in enumerate(texts):
        generator = torch.Generator().manual_seed(100 * seed + number)
        drawn = torch.randint(5, 110, (words,), generator=generator).tolist()
        place = [BOI, *[IMAGE] * IMAGE_TOKENS, EOI] if _framed(name) else [IMAGE] * IMAGE_TOKENS
        rows.append([BOS, *place * images, *drawn])
        pictures.append([_picture(name, generator) for _ in range(images)])
    width = max(map(len, rows)) + extra
    before = [(width - len(row)) if side == "left" else 0 for row in rows]
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros_like(ids)
    for i, (row, start) in enumerate(zip(rows, before, strict=True)):
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
    found = {"input_ids": ids, "attention_mask": mask}
    if targets is not None:
        found = {
            "input_ids": torch.cat([ids, targets], 1),
            "attention_mask": torch.cat([mask, torch.ones_like(targets)], 1),
            "prompt_mask": torch.cat([mask, torch.zeros_like(targets)], 1).bool(),
            "labels": torch.cat([torch.full_like(ids, -100), targets], 1),
        }
    found |= _types(name, found["input_ids"], width)
    flat = [picture for row in pictures for picture in row]
    return found | (_images(name, pictures) if flat else {})


def _framed(name: str) -> bool:
    return name.startswith("qwen") or name == "gemma3"


def _picture(name: str, generator: torch.Generator) -> Tensor:
    if name.startswith("qwen"):
        return torch.randn(16, 3 * 2 * 14 * 14, generator=generator)
    size = 56 if name in ("smolvlm", "idefics3") else 28
    return torch.randn(3, size, size, generator=generator)


def _images(name: str, pictures: list[list[Tensor]]) -> dict[str, Tensor]:
    flat = [picture for row in pictures for picture in row]
    if name.startswith("qwen"):
        return {"pixel_values": torch.cat(flat), "image_grid_thw": torch.tensor([[1, 4, 4]] * len(flat))}
    if name in ("smolvlm", "idefics3"):  # rows x images, of which those that are missing are zero
        most, none = max(map(len, pictures)), torch.zeros_like(flat[0])
        return {
            "pixel_values": torch.stack(
                [torch.stack([*row, *[none] * (most - len(row))]) for row in pictures]
            )
        }
    return {"pixel_values": torch.stack(flat)}


def _types(name: str, ids: Tensor, prompt: int) -> dict[str, Tensor]:
    if name.startswith("qwen"):
        return {"mm_token_type_ids": (ids == IMAGE).long()}
    if name == "gemma3":
        return {"token_type_ids": (ids == IMAGE).long()}
    if name == "paligemma":  # 0 is read in both directions
        return {"token_type_ids": (torch.arange(ids.shape[1]) >= prompt).long().expand_as(ids).clone()}
    return {}


# --- processors ---------------------------------------------------------------------------------------------------


def letters(**special):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": list(special.values())})
    for name, token in special.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    return tokenizer


def gemma3():
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
    from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

    pictures = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    tokenizer = letters(boi_token="<boi>", eoi_token="<eoi>", image_token="<image>")
    return Gemma3Processor(pictures, tokenizer, image_seq_length=4), tokenizer.image_token_id


def idefics3():
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

    special = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
    tokenizer = letters(**{f"t{i}": token for i, token in enumerate(special)})
    pictures = Idefics3ImageProcessorPil(
        size={"longest_edge": 56}, max_image_size={"longest_edge": 56}, do_image_splitting=False
    )
    return Idefics3Processor(pictures, tokenizer, image_seq_len=4), tokenizer.convert_tokens_to_ids("<image>")


def paligemma():
    from transformers.models.paligemma.processing_paligemma import PaliGemmaProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    pictures = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    pictures.image_seq_length = 4
    tokenizer = letters(image_token="<image>")
    return PaliGemmaProcessor(pictures, tokenizer), tokenizer.convert_tokens_to_ids("<image>")


def qwen2_vl():
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    tokenizer = letters(**{f"t{i}": f"<|{name}|>" for i, name in enumerate(QWEN)})
    pictures = Qwen2VLImageProcessor(patch_size=14, merge_size=2, min_pixels=56 * 56, max_pixels=56 * 56)
    processor = Qwen2VLProcessor(pictures, tokenizer, video_processor=Qwen2VLVideoProcessor())
    return processor, tokenizer.convert_tokens_to_ids("<|image_pad|>")


QWEN = ("image_pad", "video_pad", "vision_start", "vision_end")
PROCESSORS = {"gemma3": gemma3, "idefics3": idefics3, "paligemma": paligemma, "qwen2_vl": qwen2_vl}


def with_processor(name: str) -> tuple[Any, PreTrainedModel]:
    """Return a processor over bytes, and a tiny model of its architecture."""
    processor, image = PROCESSORS[name]()
    sizes = copy.deepcopy(CONFIGS[name])
    sizes["text_config"] |= {"vocab_size": len(processor.tokenizer)}
    key = "image_token_id" if "image_token_id" in sizes else "image_token_index"
    torch.manual_seed(1)
    others = {
        f"{name}_token_id": image + i
        for i, name in enumerate(("image", "video", "vision_start", "vision_end"))
    }
    own = others if name == "qwen2_vl" else {key: image}
    config = AutoConfig.for_model(name, **sizes | own)
    return processor, AutoModelForImageTextToText.from_config(config).eval()
