"""The data module of models that read images: a processor turns a text and its pictures into model inputs.

Pictures take up tokens of the prompt, so the layout is that of :mod:`.encoding`. Pixels are computed when a batch is
made, and are added to it under the names of the model's arguments.

Letters: b rows, s columns.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..terminal.bars import Bar
from .encoding import Collator, Encoded, EncodedRows, encode, uncut
from .example import Example
from .generation_data import GenerationData
from .prompts import apply_template, tokenizer_of
from .rows import DataSource

log = logging.getLogger(__name__)

UNCUT = 2**31  # tokens
OF_TOKENS = ("input_ids", "attention_mask", "labels")  # made here, not taken from the processor's output


class ImageData(GenerationData):
    """Loaders for a family of kind `vision`: :class:`GenerationData` with a processor instead of a tokenizer."""

    def __init__(self, family: Any, processor: Any, source: DataSource | str, **settings: Any) -> None:
        tokenizer = None if processor is None else tokenizer_of(processor)
        super().__init__(family, tokenizer, source, **settings)
        self.processor = processor

    @staticmethod
    def lay_out(reader: Any, example: Example, max_length: int) -> dict[str, Any]:
        """Return the batch of one example; nothing is cut, because the prompt contains pictures."""
        return ImageCollator(reader)([encode_image(reader, example)])

    def _check(self, example: Example) -> None:
        for picture in example.pictures:
            try:
                picture.open()
            except ValueError as error:
                raise ValueError(f"{example.source}: {error}") from error
        super()._check(example)

    def _question(self, example: Example) -> str:
        return " ".join([super()._question(example), *example.seen])

    def _encode(self, examples: list[Example], what: str, training: bool = False) -> EncodedImages:
        texts = apply_template(self.template, examples, self.processor, self.system_prompt)
        return EncodedImages(self.processor, texts, self.max_length, what)

    def _collator(self, training: bool) -> ImageCollator:
        return ImageCollator(self.processor)


@dataclass(frozen=True)
class EncodedImage(Encoded):
    """Tokens of one example with pictures.

    Args:
        types: name -> the type of each prompt token, from the processor.
        pixels: name -> model inputs for the pictures; None to process them when a batch is made.
    """

    types: Mapping[str, list[int]] = field(default_factory=dict)
    pixels: Mapping[str, Tensor] | None = field(default=None, compare=False)


def encode_image(processor: Any, example: Example) -> EncodedImage:
    """Return the tokens of one example without truncation.

    Raises:
        ValueError: if the processor rejects the pictures or the text.
    """
    prompt, target, types = _tokens(processor, example)
    listed = {name: values.tolist() for name, values in types.items()}
    return EncodedImage(prompt, target, example, types=listed)


class EncodedImages(EncodedRows):
    """Encoded examples, which keep the processor's output for each text and its pictures, except the pixels.

    Raises:
        ValueError: if a prompt leaves no room for its target (it cannot be cut, because it contains pictures), or the
            processor rejects it; names the row.
    """

    def __init__(
        self, processor: Any, examples: Sequence[Example], max_length: int, what: str = "rows"
    ) -> None:
        self._types: list[dict[str, np.ndarray]] = []
        ids: list[np.ndarray] = []
        prompts: list[int] = []
        cut: list[int] = []  # tokens of targets
        with Bar(f"encoding {what}", len(examples)) as bar:
            for example in examples:
                prompt, target, types = _tokens(processor, example)
                if len(prompt) >= max_length:
                    raise ValueError(
                        f"{example.source}: the prompt has {len(prompt)} tokens, pictures included, so "
                        f"data.max_length={max_length} leaves no room for the answer; choose a larger value"
                    )
                row = [*prompt, *target]
                ids.append(np.array(row[:max_length], np.int32))
                prompts.append(len(prompt))
                cut.append(max(len(row) - max_length, 0))
                self._types.append(types)
                bar.advance()
        if count := np.count_nonzero(cut):
            log.warning(
                "%d of %d %s: target truncated on the right, without eos; a larger data.max_length keeps more",
                count, len(examples), what,
            )  # fmt: skip
        super().__init__(examples, uncut(ids, prompts) | {"cut_target": np.array(cut, np.int32)})

    def __getitem__(self, i: int) -> EncodedImage:
        row = super().__getitem__(i)
        types = {name: values.tolist() for name, values in self._types[row.row].items()}
        return EncodedImage(**vars(row), types=types)


def _tokens(processor: Any, example: Example) -> tuple[list[int], list[int], dict[str, np.ndarray]]:
    """Return the tokens of prompt and target, and the types of the prompt tokens.

    The target tokens are those that follow the text of the prompt (:func:`.encode`), from which the prompt with its
    pictures differs only in their placeholders.
    """
    inputs = processed(processor, example)
    ids = inputs["input_ids"][0].tolist()
    types = {
        name: value[0].numpy().astype(np.int8)
        for name, value in inputs.items()
        if name not in OF_TOKENS and value.shape == inputs["input_ids"].shape
    }
    target = encode(tokenizer_of(processor), example, UNCUT).target_ids
    return ids, target, types


def processed(processor: Any, example: Example) -> dict[str, Tensor]:
    """Return the processor's output for the prompt of one example with its pictures."""
    given: dict[str, Any] = {"text": [example.prompt], "return_tensors": "pt"}
    if example.pictures:
        given["images"] = [[picture.open() for picture in example.pictures]]
    try:
        return dict(processor(**given))
    except (ValueError, TypeError, IndexError, KeyError) as error:
        where = example.source or example.task
        raise ValueError(f"{where}: {type(processor).__name__} rejects the row: {error}") from error


def _names_suffix(processor: Any) -> bool:
    """Return whether a processor takes a `suffix` after a prefix read in both directions, as PaliGemma's does."""
    if "suffix" in inspect.signature(type(processor).__call__).parameters:
        return True
    options = getattr(type(processor), "valid_processor_kwargs", None)  # its place up to transformers 5.21
    of_texts = getattr(options, "__annotations__", {}).get("text_kwargs")
    return "suffix" in getattr(of_texts, "__annotations__", {})


class ImageCollator:
    """Collate encoded rows into the prompt | target layout, with the types of their tokens and their pixels.

    A batch can mix rows with and without pictures. Most models take the pictures of all rows in a single list; some
    (Idefics3, SmolVLM) take one list per row, with shorter lists padded with zeros.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        pad: Any = tokenizer_of(processor).pad_token_id
        self._collate = Collator(pad)
        self._type_of_target = int(_names_suffix(processor))
        self._by_row = _by_row(processor)

    def __call__(self, rows: Sequence[EncodedImage]) -> dict[str, Any]:
        """Return the batch of `Collator` with the other model inputs."""
        batch = self._collate(rows)
        for name in dict.fromkeys(name for row in rows for name in row.types):
            batch[name] = self._types(name, rows, batch)
        seen = [self.pixels(row) for row in rows]
        for name in dict.fromkeys(name for row in seen for name in row):
            parts = [row[name] for row in seen if name in row]
            if self._by_row:
                none = parts[0].new_zeros([1, *[0] * (parts[0].ndim - 1)])
                parts = [row.get(name, none) for row in seen]
            batch[name] = _stacked(parts)
        return batch

    def pixels(self, row: EncodedImage) -> Mapping[str, Tensor]:
        """Return the model inputs for a row's pictures."""
        if row.pixels is not None or not row.example.pictures:
            return row.pixels or {}
        inputs = processed(self.processor, row.example)
        return {name: value for name, value in inputs.items() if name not in (*OF_TOKENS, *row.types)}

    def _types(self, name: str, rows: Sequence[EncodedImage], batch: Mapping[str, Any]) -> Tensor:  # (b, s)
        boundary = batch["boundary"]
        types = torch.zeros_like(batch["input_ids"])
        types[:, boundary:] = self._type_of_target
        for i, row in enumerate(rows):
            own = torch.tensor(row.types.get(name, [0] * len(row.prompt_ids)))
            types[i, boundary - len(own) : boundary] = own
        return types


def _by_row(processor: Any) -> bool:
    """Return whether a processor makes one list of pictures per row, by trying a row with two pictures."""
    from PIL import Image

    picture = Image.new("RGB", (64, 64))
    pixels = processor(text=[processor.image_token * 2], images=[[picture, picture]], return_tensors="pt")
    return len(pixels["pixel_values"]) == 1


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors, each padded with zeros to the largest size."""
    sizes = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    return torch.cat([
        F.pad(part, [n for size, own in zip(reversed(sizes), reversed(part.shape[1:]), strict=True)
                     for n in (0, size - own)])
        for part in parts
    ])  # fmt: skip
