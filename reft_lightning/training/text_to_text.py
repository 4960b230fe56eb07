"""Train an encoder-decoder model and evaluate it by the texts it writes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..adapters.adapted import AdaptedModel
from ..data.example import Example
from ..data.option_batches import option_batches
from ..evaluation import Decoding, target_log_likelihood, write
from .generation import GenerationModule


class TextToTextModule(GenerationModule):
    """:class:`GenerationModule` for prompts and targets that are separate texts."""

    def check_reads(self, model: AdaptedModel) -> None:
        """Accept every model, because the encoder does not read answers."""

    def tokens_in(self, batch: dict[str, Any]) -> int:
        """Return the number of tokens in a batch, including those of its targets."""
        return super().tokens_in(batch) + int((batch["labels"] != -100).sum())

    def option_batches(self, examples: list[Example]) -> list[dict[str, Any]]:
        """Return one batch for each option index."""
        return option_batches(self.tokenizer, examples, self.max_length, two_texts=True)

    def reader(self) -> None:
        """Return None, because each pass reads its prompts itself."""

    def log_likelihood(self, batch: dict[str, Any], reader: None) -> Tensor:  # -> (b,)
        """Return the log-likelihood of the targets."""
        return target_log_likelihood(self.model, batch)

    def drafted(
        self, batch: dict[str, Any], batches: list[dict[str, Any]], choice: list[int]
    ) -> dict[str, Any]:
        """Return the batch unchanged, because drafts are not checked."""
        return batch

    def texts(self, batch: dict[str, Any], decoding: Decoding, reader: None) -> list[list[str]]:
        """Return the texts that the decoder writes for each row."""
        return write(self.model, batch, self.tokenizer, decoding)
