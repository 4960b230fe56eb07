"""The data module of texts without prompts; a language model learns every token of them."""

from __future__ import annotations

from .benchmark_data import BenchmarkData
from .encoding import EncodedRows, encode_pieces, refuse_empty
from .example import Example, normalized
from .generation_data import GenerationData


class TextData(GenerationData):
    """Loaders for a family of kind `text`, whose rows are pieces of texts; takes the arguments of `GenerationData`."""

    def _check(self, example: Example) -> None:
        BenchmarkData._check(self, example)
        refuse_empty(example, ("target",))

    def _question(self, example: Example) -> str:
        return normalized(example.target)

    def _encoded(self, examples: list[Example], what: str, target_tokens: int | None = None) -> EncodedRows:
        return encode_pieces(self.tokenizer, examples, self.max_length, what)
