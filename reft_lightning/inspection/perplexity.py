r"""The perplexity of a text: :math:`\exp(-\frac{1}{t} \sum \log p)` over the t predicted tokens.

The text is cut into windows. The first tokens of each are its prompt, which an adapter edits like any prompt, and the
others are predicted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..adapters.adapted import AdaptedModel
from ..data.encoding import Collator, Encoded, leading_ids
from ..data.example import Example
from ..evaluation import ColumnReader, log_likelihood

PROMPT, PREDICTED = 32, 96  # tokens per window
MOST = 16  # windows, at most
OWN = Path(__file__).with_name("passage.txt")  # written for this purpose


def windows(tokenizer: Any, path: Path = OWN) -> dict[str, Any]:
    """Return the windows of a text file as one batch; an incomplete last window is dropped.

    Raises:
        ValueError: for a text shorter than one window.
    """
    ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    size = PROMPT + PREDICTED
    if len(ids) < size:
        raise ValueError(f"text={path} must have at least {size} tokens, one window; got {len(ids)}")
    example = Example("text", path.name, path.name, path.name)
    parts = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)][:MOST]
    rows = [Encoded(leading_ids(tokenizer) + part[:PROMPT], part[PROMPT:], example) for part in parts]
    return Collator(tokenizer.pad_token_id)(rows)


def perplexity(model: AdaptedModel, batch: dict[str, Any], device: torch.device) -> float:
    """Return the perplexity of the windows."""
    batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    tokens = (batch["labels"] != -100).sum()
    return float((-log_likelihood(ColumnReader(model), batch).sum() / tokens).exp())
