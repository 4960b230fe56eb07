"""The data module of texts without prompts; a language model learns every token of them."""

from __future__ import annotations

import logging
from typing import Any

from .benchmark_data import BenchmarkData
from .columns import Texts
from .encoding import EncodedRows, encode_pieces, refuse_empty
from .example import Example, normalized
from .generation_data import GenerationData

log = logging.getLogger(__name__)


class TextData(GenerationData):
    """Loaders for a family of kind `text`, whose rows are pieces of texts; takes the arguments of `GenerationData`."""

    def _examples(self, make: Any, rows: Any, facts: Any, what: str, part: str, name: str) -> list[Any]:
        if part == "train" and isinstance(make, Texts):
            unread = [
                column
                for row, _ in rows[:1]
                for column, value in row.items()
                if isinstance(value, str) and value.strip() and column not in make.names
            ]
            if unread:
                log.warning(
                    "data.prompt is not set, so the rows are texts without a prompt; columns of text that are not "
                    "read: %s. If data.target answers one of them, set data.prompt to it", ", ".join(unread),
                )  # fmt: skip
        return super()._examples(make, rows, facts, what, part, name)

    def _check(self, example: Example) -> None:
        BenchmarkData._check(self, example)
        refuse_empty(example, ("target",))

    def _question(self, example: Example) -> str:
        return normalized(example.target)

    def _encoded(self, examples: list[Example], what: str, target_tokens: int | None = None) -> EncodedRows:
        return encode_pieces(self.tokenizer, examples, self.max_length, what)
