"""Generate continuations for a batch of prompts.

Greedy decoding does not have to run token by token if the answer can be guessed. The gold target, or the likeliest
option, serves as a draft: one pass over prompt | draft gives the model's next token after every prefix of the draft.
This yields the longest prefix on which the two agree, and the model's own token after it. Only rows that have not ended
there are decoded further, from the keys and values of that pass. The draft affects only the speed, never the tokens
(speculative decoding with a given draft: Leviathan et al. 2023, arXiv:2211.17192, at temperature 0).

The ids are those of plain greedy decoding up to rounding: a 16-bit base model may resolve a near tie differently, as
also happens between plain decodings of the same rows with different padding (counts in
``experiments/speed/README.md``).

Shapes: b rows, s columns of prompt | target, t target columns, n new tokens, r rows decoded further.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..base_models.caches import CACHE
from ..base_models.reading import keeps_its_columns
from .prefix_reader import COLUMNS, ColumnReader, seen_in, sources_in

log = logging.getLogger(__name__)

LEAST = {"max_new_tokens": 1, "num_beams": 1, "samples": 1, "top_k": 0, "no_repeat_ngram_size": 0}


@dataclass(frozen=True)
class Decoding:
    """How texts are generated; the defaults are greedy decoding.

    Args:
        max_new_tokens: maximum number of tokens in each text, including the end-of-text token.
        do_sample: sample tokens instead of taking the likeliest.
        temperature: temperature of the sampling distribution.
        top_p: sample from the likeliest tokens that together have this probability.
        top_k: sample from this many of the likeliest tokens; 0 for all.
        num_beams: number of beams; beam search ends as soon as that many texts are complete, as in the authors' code.
        no_repeat_ngram_size: no n-gram of this size may occur twice in prompt and text; 0 for no limit.
        repetition_penalty: divides the logits of tokens that have already occurred.
        samples: number of texts per row.
        verify: for plain greedy decoding, check the target in a single pass first; the texts stay the same.
        stop_strings: a text ends after any of these.
        seed: seed of the sampling, combined with the prompts of the batch: the same rows in the same batch get the
            same texts, whatever was sampled before.

    Raises:
        ValueError: if a value is out of range, or several samples would all be the same.
    """

    max_new_tokens: int
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    num_beams: int = 1
    no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    samples: int = 1
    verify: bool = True
    stop_strings: tuple[str, ...] = ()
    seed: int = 42

    def __post_init__(self) -> None:
        # transformers checks these during generation or not at all, and the number of samples when it is configured
        for name, low in LEAST.items():
            if getattr(self, name) < low:
                raise ValueError(f"decoding.{name} must be at least {low}; got {getattr(self, name)}")
        for name, most in {"temperature": math.inf, "repetition_penalty": math.inf, "top_p": 1.0}.items():
            if not 0 < getattr(self, name) <= most:
                raise ValueError(
                    f"decoding.{name} must be positive{' and at most 1' if most == 1 else ''}; got "
                    f"{getattr(self, name)} (do_sample=false decodes greedily)"
                )
        try:
            GenerationConfig(**self.arguments)
        except ValueError as error:
            message = str(error).replace("num_return_sequences", "samples").replace("`", "")
            raise ValueError(f"decoding.samples={self.samples}: {message}") from error
        unused = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        changed = [name for name, default in unused.items() if getattr(self, name) != default]
        if changed and not self.do_sample:
            log.warning("decoding.%s: no effect without decoding.do_sample=true", ", ".join(changed))

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the settings under transformers' names, except those that ``GenerationConfig`` does not have."""
        names = ["max_new_tokens", "do_sample", "num_beams", "repetition_penalty", "no_repeat_ngram_size"]
        names += ["temperature", "top_p", "top_k"] if self.do_sample else []
        beams = {"early_stopping": True} if self.num_beams > 1 else {}
        return {name: getattr(self, name) for name in names} | {"num_return_sequences": self.samples} | beams

    @property
    def verifiable(self) -> bool:
        """Whether every token is the likeliest one given those before it, so that a draft can be checked."""
        plain = not self.do_sample and self.num_beams == self.samples == 1
        return plain and self.no_repeat_ngram_size == 0 and self.repetition_penalty == 1.0


def generate(
    model: Any,
    batch: dict[str, Any],
    tokenizer: Any,
    decoding: Decoding,
    reader: ColumnReader | None = None,
) -> list[list[str]]:
    """Return the texts that a model generates for the prompts of a batch: ``texts[row][sample]``.

    Special tokens are left out. See :func:`generate_ids`. The new ids are decoded together with the prompt's last
    token, because SentencePiece tokenizers (Llama's) would otherwise drop the leading blank, and code would lose its
    indentation.
    """
    ids = generate_ids(model, batch, tokenizer, decoding, reader)
    last = batch["input_ids"][:, batch["boundary"] - 1].repeat_interleave(decoding.samples)
    before, wholes, news = (
        tokenizer.batch_decode(part, skip_special_tokens=True)
        for part in (last.unsqueeze(-1), torch.cat([last.unsqueeze(-1), ids], -1), ids)
    )
    # if a character of several tokens spans the boundary, only the new ids are decoded
    texts = [
        whole.removeprefix(start) if whole.startswith(start) else text
        for start, whole, text in zip(before, wholes, news, strict=True)
    ]
    return [texts[i : i + decoding.samples] for i in range(0, len(texts), decoding.samples)]


@torch.no_grad()
def generate_ids(
    model: Any,
    batch: dict[str, Any],
    tokenizer: Any,
    decoding: Decoding,
    reader: ColumnReader | None = None,
) -> Tensor:
    """Return the token ids generated for the prompts of a batch, padded to ``max_new_tokens`` columns.

    The generation defaults shipped with a model (sampling, penalties, suppressed tokens) are ignored.

    Args:
        model: an adapted model. ``forward`` numbers the tokens of left-padded rows and returns ``logits`` and
            its cache; ``generate`` also takes ``prompt_mask``, which marks the prompt's columns if the input
            contains part of the answer.
        batch: ``input_ids``, ``attention_mask``, ``prompt_mask`` (b, s) and ``boundary``, the column where prompts end
            and targets start. Decoding is plain, without drafts, if the batch has no target columns, or if the model's
            columns depend on those after them.
        tokenizer: provides the ids of eos and pad, and decodes texts if there are stop strings.
        decoding: the settings.
        reader: a reader of the model, if it has already read these prompts; a draft is checked from the columns it
            has read, which it then forgets.

    Returns:
        (b * samples, max_new_tokens): rows in order, with the samples of a row next to each other.
    """
    boundary = batch["boundary"]
    reader = reader or ColumnReader(model)
    with without_generation_defaults(model):
        drafted = batch["input_ids"].shape[1] > boundary
        plain = decoding.verify and decoding.verifiable and "edit_mask" not in batch
        if plain and drafted and keeps_its_columns(model.base_model):
            return _verified(reader, batch, tokenizer, decoding)
        reader.forget()
        ids = batch["input_ids"][:, :boundary]
        attention = batch["attention_mask"][:, :boundary] * batch["prompt_mask"][:, :boundary]
        with own_randomness(decoding.seed, ids) if decoding.do_sample else nullcontext():
            return _decode(model, tokenizer, decoding, ids, attention, **seen_in(batch, boundary))


def _decode(
    model: Any, tokenizer: Any, decoding: Decoding, ids: Tensor, attention: Tensor, **more: Any
) -> Tensor:  # (r, s) x 2 -> (r, max_new_tokens)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = GenerationConfig(**decoding.arguments, **special)
    if decoding.stop_strings:
        prompt = more.get("prompt_mask", torch.ones_like(ids, dtype=torch.bool))
        first = prompt.shape[1] - (attention.bool() & ~prompt).sum(-1).repeat_interleave(decoding.samples)
        more["stopping_criteria"] = StoppingCriteriaList(
            [Stop(tokenizer, decoding.stop_strings, first.tolist())]
        )
    # ranks that share a base may decode different numbers of rows, but Hugging Face would wait for equal numbers
    given = {"input_ids": ids, "attention_mask": attention, "generation_config": config, "synced_gpus": False}
    whole = model.generate(**given, **more)
    new = whole[:, ids.shape[1] :]
    return F.pad(new, (0, decoding.max_new_tokens - new.shape[1]), value=tokenizer.pad_token_id)


# --- the target as a draft ------------------------------------------------------------------------------------


def _verified(reader: ColumnReader, batch: dict[str, Any], tokenizer: Any, decoding: Decoding) -> Tensor:
    boundary, most = batch["boundary"], decoding.max_new_tokens
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    target = batch["attention_mask"].bool()[:, boundary:] & ~batch["prompt_mask"][:, boundary:]
    draft = target & ((batch["input_ids"][:, boundary:] == eos).cumsum(-1) == 0)  # ends before eos
    t = min(int(draft.sum(-1).max()), most - 1)  # and before the last token allowed
    inputs = {name: batch[name][:, : boundary + t] for name in COLUMNS} | sources_in(batch)
    logits = reader.logits({**inputs, "boundary": boundary})  # (b, t + 1, v)
    # The model's token after the prompt and after each token of the draft, with the argmax in float32 as in generate();
    # column by column, because all columns at once would need a second copy of the logits.
    own = torch.stack([column.float().argmax(-1) for column in logits.unbind(1)], 1)  # (b, t + 1)
    del logits
    cache = reader.take_cache()
    agreed = draft[:, :t] & (inputs["input_ids"][:, boundary:] == own[:, :-1])
    accepted = agreed.long().cumprod(-1).sum(-1)  # (b,), tokens of the draft
    # the accepted tokens and the model's own token after them are known
    known = torch.arange(t + 1, device=own.device) <= accepted[:, None]
    ends = own == eos
    if decoding.stop_strings:
        ends |= _stops(own, tokenizer, decoding.stop_strings)
    ends &= known
    ended = ends.cumsum(-1) - ends.long() > 0
    tokens = F.pad(own.masked_fill(ended | ~known, pad), (0, most - t - 1), value=pad)
    rows = (~ends.any(-1) & (accepted + 1 < most)).nonzero().squeeze(-1)
    if len(rows):
        _continue(reader.model, tokenizer, decoding, inputs, boundary, cache, rows, accepted[rows], tokens)
    return tokens


class Stop(StoppingCriteria):
    """End a row whose new text contains a stop string.

    Hugging Face's own criterion also matches across the end of the prompt: after a prompt that ends in a newline, it
    would end a text that begins with "def" if the stop string is a newline and "def". ``first`` holds the column where
    each row's new text begins.
    """

    def __init__(self, tokenizer: Any, stop_strings: tuple[str, ...], first: list[int]) -> None:
        self.tokenizer, self.stop_strings, self.first = tokenizer, stop_strings, first

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # (r, s) -> (r,)
        """Return which rows have ended."""
        repeated = len(input_ids) // len(self.first)  # the beams of a row are next to each other
        firsts = (first for first in self.first for _ in range(repeated))
        rows = zip(input_ids.tolist(), firsts, strict=True)
        texts = self.tokenizer.batch_decode([row[first:] for row, first in rows], skip_special_tokens=True)
        found = [any(stop in text for stop in self.stop_strings) for text in texts]
        return torch.tensor(found, device=input_ids.device)


def _stops(tokens: Tensor, tokenizer: Any, stop_strings: tuple[str, ...]) -> Tensor:  # (b, n) -> (b, n)
    """Return for each new token whether the text has ended after it."""
    stop = Stop(tokenizer, stop_strings, [0] * len(tokens))
    return torch.stack([stop(tokens[:, : j + 1], None) for j in range(tokens.shape[1])], 1)


def _continue(
    model: Any,
    tokenizer: Any,
    decoding: Decoding,
    inputs: dict[str, Tensor],  # (b, s)
    boundary: int,
    cache: DynamicCache | None,  # of all s columns; if None, prefixes are read again
    rows: Tensor,  # (r,)
    accepted: Tensor,  # (r,), tokens of the draft
    tokens: Tensor,  # (b, max_new_tokens), filled in place
) -> None:
    """Continue decoding some rows after their known tokens, left-padded to a common column again."""
    width, most = inputs["input_ids"].shape[1], tokens.shape[1]
    # The last known token is the model's own, which was not read in the pass over the draft.
    last = tokens[rows].gather(1, accepted[:, None])  # (r, 1)
    new = torch.ones_like(last, dtype=torch.bool)
    kept = torch.arange(width, device=rows.device) < (boundary + accepted)[:, None]
    attention = torch.cat([inputs["attention_mask"][rows].bool() & kept, new], 1)
    order = torch.argsort(attention.long(), dim=-1, stable=True)  # moves dropped columns to the left
    order = order[:, width + 1 - int(attention.sum(-1).max()) :]
    ids = torch.cat([inputs["input_ids"][rows], last], 1).gather(1, order)
    prompt = torch.cat([inputs["prompt_mask"][rows], ~new], 1).gather(1, order)
    more: dict[str, Any] = {"prompt_mask": prompt} | {
        name: value[rows] for name, value in sources_in(inputs).items()
    }
    if cache is not None:
        more[CACHE] = _taken(cache, rows, order[:, :-1])
    rest = replace(decoding, max_new_tokens=most - 1 - int(accepted.min()))
    found = _decode(model, tokenizer, rest, ids, attention.gather(1, order).long(), **more)
    for row, known, further in zip(rows.tolist(), (accepted + 1).tolist(), found, strict=True):
        tokens[row, known:] = further[: most - known]


def _taken(cache: Any, rows: Tensor, order: Tensor) -> DynamicCache:
    """Reduce a cache to the given rows and columns, in place, and return it."""
    for layer in cache.layers:
        at, columns = rows.to(layer.keys.device), order.to(layer.keys.device)[:, None, :, None]
        for name in ("keys", "values"):
            states = getattr(layer, name)[at]  # (r, heads, width, d)
            setattr(layer, name, states.gather(2, columns.expand(-1, states.shape[1], -1, states.shape[3])))
    return cache


# --- randomness and defaults ----------------------------------------------------------------------------------


@contextmanager
def own_randomness(seed: int, ids: Tensor) -> Iterator[None]:
    """Draw random numbers from a stream seeded by seed and prompts, and leave training's stream unchanged."""
    digest = hashlib.sha256(ids.cpu().numpy().tobytes() + str((seed, *ids.shape)).encode()).digest()
    own = int.from_bytes(digest[:8], "little") >> 1
    cuda = ids.device.type == "cuda"
    with torch.random.fork_rng(devices=[ids.device] if cuda else []):
        torch.default_generator.manual_seed(own)
        if cuda:
            with torch.cuda.device(ids.device):
                torch.cuda.manual_seed(own)
        yield


@contextmanager
def without_generation_defaults(model: nn.Module) -> Iterator[None]:
    """Temporarily replace the generation defaults of a model, which ``generate`` would use for unset options."""
    owners = [module for module in model.modules() if isinstance(module, GenerationMixin)]
    shipped = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = GenerationConfig()
        yield
    finally:
        for owner, settings in zip(owners, shipped, strict=True):
            owner.generation_config = settings
