"""Generate continuations for a batch of prompts.

Greedy decoding need not run token by token where the answer can be guessed. The gold target, or the likeliest option,
serves as a draft: one pass over prompt | draft gives the model's next token after every prefix of the draft, so the
longest prefix on which the two agree is known at once, and the model's own token after it. Only rows that have not
ended by then are decoded further, from the keys and values of that pass. The draft decides how fast the tokens are
known, never which they are (speculative decoding with a given draft: Leviathan et al. 2023, arXiv:2211.17192, at
temperature 0).

The ids are those of plain greedy decoding up to rounding: a 16-bit base model may resolve a near tie differently, as it
does between plain decodings of the same rows under different padding (counts in ``experiments/speed/README.md``).

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

from ..base_models.reading import keeps_its_columns
from .prefix_reader import COLUMNS, ColumnReader, seen_in, sources_in

log = logging.getLogger(__name__)

LEAST = {"max_new_tokens": 1, "num_beams": 1, "samples": 1, "top_k": 0, "no_repeat_ngram_size": 0}


@dataclass(frozen=True)
class Decoding:
    """How texts are generated; the defaults are greedy decoding.

    Args:
        max_new_tokens: of each text, end of text included.
        do_sample: draw tokens instead of taking the likeliest.
        temperature: of the distribution drawn from.
        top_p: draw from the likeliest tokens that hold this share.
        top_k: draw from this many of the likeliest tokens; 0 from all.
        num_beams: of beam search, which ends as soon as that many texts are complete, as in the authors' code.
        no_repeat_ngram_size: no n-gram of this size occurs twice in prompt and text; 0 for no such rule.
        repetition_penalty: divides the logits of tokens that occurred already.
        samples: texts for each row.
        verify: check the target in one pass first, where decoding is plainly greedy; the texts stay the same.
        stop_strings: a text ends after one of these.
        seed: of the draws, together with the prompts of the batch: the same rows in the same batch get the same
            texts, whatever was drawn before.

    Raises:
        ValueError: for a value out of range, or several samples that would all be the same.
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
        # transformers checks these while it generates or not at all, and the number of samples when it is configured
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
        """The settings under transformers' names, as far as its ``GenerationConfig`` has them."""
        names = ["max_new_tokens", "do_sample", "num_beams", "repetition_penalty", "no_repeat_ngram_size"]
        names += ["temperature", "top_p", "top_k"] if self.do_sample else []
        beams = {"early_stopping": True} if self.num_beams > 1 else {}
        return {name: getattr(self, name) for name in names} | {"num_return_sequences": self.samples} | beams

    @property
    def verifiable(self) -> bool:
        """Whether every token is the likeliest one after those before it, so that a draft can be checked."""
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
    token: on their own, SentencePiece tokenizers (Llama's) drop the leading blank, and code loses its indentation.
    """
    ids = generate_ids(model, batch, tokenizer, decoding, reader)
    last = batch["input_ids"][:, batch["boundary"] - 1].repeat_interleave(decoding.samples)
    before, wholes, news = (
        tokenizer.batch_decode(part, skip_special_tokens=True)
        for part in (last.unsqueeze(-1), torch.cat([last.unsqueeze(-1), ids], -1), ids)
    )
    # a character of several tokens may span the boundary: then only the new ids are decoded
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

    The generation defaults that a model ships (sampling, penalties, suppressed tokens) are ignored.

    Args:
        model: an adapted model. ``forward`` numbers the tokens of left-padded rows and returns ``logits`` and
            ``past_key_values``; ``generate`` also takes ``prompt_mask``: which columns are prompt, if the
            input holds part of the answer.
        batch: ``input_ids``, ``attention_mask``, ``prompt_mask`` (b, s) and ``boundary``, the column in which prompts
            end and targets start. A batch without target columns is decoded plainly, and so is every batch of a model
            whose columns depend on what comes after them.
        tokenizer: its ids of eos and pad, and its vocabulary where there are stop strings.
        decoding: the settings.
        reader: of the model, if the same prompts were read before: a draft is checked from what it has read, which
            it forgets.

    Returns:
        (b * samples, max_new_tokens): rows in order, the samples of a row next to each other.
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
    # ranks that share a base decode other rows, as many or fewer: Hugging Face would wait for the same number of them
    given = {"input_ids": ids, "attention_mask": attention, "generation_config": config, "synced_gpus": False}
    whole = model.generate(**given, **more)
    new = whole[:, ids.shape[1] :]
    return F.pad(new, (0, decoding.max_new_tokens - new.shape[1]), value=tokenizer.pad_token_id)


# --- the target as a draft ------------------------------------------------------------------------------------


def _verified(reader: ColumnReader, batch: dict[str, Any], tokenizer: Any, decoding: Decoding) -> Tensor:
    boundary, most = batch["boundary"], decoding.max_new_tokens
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    target = batch["attention_mask"].bool()[:, boundary:] & ~batch["prompt_mask"][:, boundary:]
    draft = target & ((batch["input_ids"][:, boundary:] == eos).cumsum(-1) == 0)  # nothing follows eos
    t = min(int(draft.sum(-1).max()), most - 1)  # nor the last token allowed
    inputs = {name: batch[name][:, : boundary + t] for name in COLUMNS} | sources_in(batch)
    logits = reader.logits({**inputs, "boundary": boundary})  # (b, t + 1, v)
    # The model's token after the prompt and after each token of the draft; column by column, as generate() takes the
    # argmax in float32: all columns at once would be a second copy of the logits.
    own = torch.stack([column.float().argmax(-1) for column in logits.unbind(1)], 1)  # (b, t + 1)
    del logits
    cache = reader.take_cache()
    agreed = draft[:, :t] & (inputs["input_ids"][:, boundary:] == own[:, :-1])
    accepted = agreed.long().cumprod(-1).sum(-1)  # (b,), tokens of the draft
    # known are the accepted tokens and the model's own after them
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
    """End a row whose new text holds a stop string.

    Hugging Face's own criterion reads across the end of the prompt: after a newline, a text that begins with "def"
    would end there.

    Args:
        tokenizer: decodes the new tokens.
        stop_strings: any of them ends a text.
        first: of each row, the column in which its new text begins.
    """

    def __init__(self, tokenizer: Any, stop_strings: tuple[str, ...], first: list[int]) -> None:
        self.tokenizer, self.stop_strings, self.first = tokenizer, stop_strings, first

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # (r, s) -> (r,)
        """Return which rows have ended."""
        repeated = len(input_ids) // len(self.first)  # beams of a row stand next to each other
        firsts = (first for first in self.first for _ in range(repeated))
        rows = zip(input_ids.tolist(), firsts, strict=True)
        texts = self.tokenizer.batch_decode([row[first:] for row, first in rows], skip_special_tokens=True)
        found = [any(stop in text for stop in self.stop_strings) for text in texts]
        return torch.tensor(found, device=input_ids.device)


def _stops(tokens: Tensor, tokenizer: Any, stop_strings: tuple[str, ...]) -> Tensor:  # (b, n) -> (b, n)
    """Return after which of the new tokens a text has ended."""
    stop = Stop(tokenizer, stop_strings, [0] * len(tokens))
    return torch.stack([stop(tokens[:, : j + 1], None) for j in range(tokens.shape[1])], 1)


def _continue(
    model: Any,
    tokenizer: Any,
    decoding: Decoding,
    inputs: dict[str, Tensor],  # (b, s)
    boundary: int,
    cache: DynamicCache | None,  # of all s columns; without it prefixes are read again
    rows: Tensor,  # (r,)
    accepted: Tensor,  # (r,), tokens of the draft
    tokens: Tensor,  # (b, max_new_tokens), filled in place
) -> None:
    """Decode some rows after their known tokens, left-padded to one column again."""
    width, most = inputs["input_ids"].shape[1], tokens.shape[1]
    # The last known token is the model's own, which the pass over the draft has not read.
    last = tokens[rows].gather(1, accepted[:, None])  # (r, 1)
    new = torch.ones_like(last, dtype=torch.bool)
    kept = torch.arange(width, device=rows.device) < (boundary + accepted)[:, None]
    attention = torch.cat([inputs["attention_mask"][rows].bool() & kept, new], 1)
    order = torch.argsort(attention.long(), dim=-1, stable=True)  # dropped columns to the left
    order = order[:, width + 1 - int(attention.sum(-1).max()) :]
    ids = torch.cat([inputs["input_ids"][rows], last], 1).gather(1, order)
    prompt = torch.cat([inputs["prompt_mask"][rows], ~new], 1).gather(1, order)
    more: dict[str, Any] = {"prompt_mask": prompt} | {
        name: value[rows] for name, value in sources_in(inputs).items()
    }
    if cache is not None:
        more["past_key_values"] = _taken(cache, rows, order[:, :-1])
    rest = replace(decoding, max_new_tokens=most - 1 - int(accepted.min()))
    found = _decode(model, tokenizer, rest, ids, attention.gather(1, order).long(), **more)
    for row, known, further in zip(rows.tolist(), (accepted + 1).tolist(), found, strict=True):
        tokens[row, known:] = further[: most - known]


def _taken(cache: Any, rows: Tensor, order: Tensor) -> DynamicCache:
    """Return a cache with other rows and columns, changed in place."""
    for layer in cache.layers:
        at, columns = rows.to(layer.keys.device), order.to(layer.keys.device)[:, None, :, None]
        for name in ("keys", "values"):
            states = getattr(layer, name)[at]  # (r, heads, width, d)
            setattr(layer, name, states.gather(2, columns.expand(-1, states.shape[1], -1, states.shape[3])))
    return cache


# --- randomness and defaults ----------------------------------------------------------------------------------


@contextmanager
def own_randomness(seed: int, ids: Tensor) -> Iterator[None]:
    """Draw from a stream of the seed and the prompts, and leave the stream of training as it was."""
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
    """Set aside the generation defaults of a model, which ``generate`` uses for what is not set."""
    owners = [module for module in model.modules() if isinstance(module, GenerationMixin)]
    shipped = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = GenerationConfig()
        yield
    finally:
        for owner, settings in zip(owners, shipped, strict=True):
            owner.generation_config = settings
