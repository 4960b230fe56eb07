"""A run of ``reft-train`` as a benchmark needs it: rows, given or invented, and the overrides that read them."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Tokens of a prompt at every twentieth part of a commonsense mixture of 15,119 rows (seven of the eight tasks' train
# rows, rendered as LLM-Adapters renders them; tokenizer of SmolLM2): mean 86. Answers have 6 or 7 tokens.
PROMPT_QUANTILES = (
    *(30, 31, 33, 48, 53, 55, 57, 59, 61, 63),
    *(66, 68, 71, 75, 80, 88, 101, 119, 164, 250, 500),
)
INVENTED_TARGET = "answer"  # six bytes and the end of text


def invented_lengths(count: int) -> list[int]:
    """Return prompt lengths that are spread as the mixture's are, in a random order that is always the same."""
    last = len(PROMPT_QUANTILES) - 1
    lengths = []
    for i in range(count):
        below, part = divmod((i + 0.5) / count * last, 1)
        low, high = PROMPT_QUANTILES[int(below)], PROMPT_QUANTILES[int(below) + 1]
        lengths.append(round(low + part * (high - low)))
    random.Random(0).shuffle(lengths)
    return lengths


def invented_rows(lengths: Sequence[int]) -> list[dict[str, str]]:
    """Return rows whose prompts have these lengths in tokens of the byte tokenizer (BOS and newline included)."""
    letters = random.Random(0)
    return [
        {
            "instruction": "".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=length - 2)),
            "output": INVENTED_TARGET,
        }
        for length in lengths
    ]


def sampled_rows(mixture: Path, count: int) -> list[dict[str, Any]]:
    """Return random rows of a mixture file, always the same."""
    content = gzip.decompress(mixture.read_bytes()) if mixture.suffix == ".gz" else mixture.read_bytes()
    rows = json.loads(content)
    if len(rows) < count:
        raise ValueError(f"{mixture.name} has {len(rows)} rows; --limit asks for {count}")
    return random.Random(0).sample(rows, count)


def tokenizer_of(folder: str, invented: bool) -> str | None:
    """Return the tokenizer of a run: bytes for invented rows, whose tokens are letters, else the model's own."""
    if invented:
        return "bytes"
    if not any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ValueError(f"{Path(folder).name} holds no tokenizer; rows of text need one")
    return None


def overrides(folder: str, mixture: Path, tokenizer: str | None, *, batch_size: int) -> list[str]:
    """Return the overrides of a run on the CPU that trains on a mixture file and evaluates nothing."""
    return [
        "model=smollm2_135m",
        "model.source=local",
        "model.package=null",
        "model.sha256=null",
        "model.dtype=float32",
        f"model.path='{folder}'",
        f"model.tokenizer={'null' if tokenizer is None else tokenizer}",
        "trainer=cpu",
        "trainer.max_epochs=1",
        "trainer.enable_progress_bar=false",
        "data=custom",
        f"data.path='{mixture}'",
        "data.prompt=instruction",
        "data.target=output",
        f"data.batch_size={batch_size}",
        "data.validation_size=0",
        "checkpoint.restore_best=false",
        "checkpoint.monitor=val/loss",
        "checkpoint.mode=min",
        "test=false",
    ]
