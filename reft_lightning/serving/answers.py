"""A request and its answer, which grows token by token.

Shapes: b rows, v tokens of the vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

log = logging.getLogger(__name__)

UNFINISHED = "�"  # a tokenizer's output for a character whose remaining bytes are still to come
AGAIN = 32  # tokens that are decoded again with each new one
CLEANED = 8  # characters at the end that may still change if a tokenizer removes blanks, as in "do n't"


@dataclass(frozen=True)
class Likelihood:
    """A token and its log-probability under the model, before temperature and top_p."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the most likely tokens, best first


@dataclass(frozen=True)
class Part:
    """The next piece of an answer."""

    text: str
    likelihoods: tuple[Likelihood, ...] = ()
    finish: str | None = None  # stop or length, with the last piece


@dataclass
class Answer:
    """One request, and its answer so far."""

    prompt: list[int]  # token ids
    # called from the generating thread with each :class:`Part`, or with the exception that ended the answer
    emit: Callable[[Part | Exception], Any]
    adapter: str | None = None  # the model's name for the adapter, or None for the base
    strength: float = 1.0  # multiplies the adapter's scale
    max_tokens: int = 256  # of the answer
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # sample from the most likely tokens with this total probability
    seed: int | None = None  # of the sampling; the answer does not depend on the rest of the batch
    stop: Sequence[str] = ()  # the answer ends before any of these
    follows: bool = True  # whether its text continues the prompt's; false for an encoder-decoder
    top: int | None = None  # number of most likely tokens to report; None reports no log-probabilities
    seen: Any = None  # the prompt with its pictures (:class:`EncodedImage`), for a model that reads pictures
    tokens: list[int] = field(default_factory=list)
    done: bool = False
    cancelled: bool = False

    def __post_init__(self) -> None:
        self._sent = 0  # characters
        self._waiting: list[Likelihood] = []
        self._draws: torch.Generator | None = None
        # (ids, text) before the tokens to decode, from a character boundary: the end of the prompt or of settled text
        self._before: tuple[list[int], str] | None = None
        self._cleans = False  # whether the tokenizer removes blanks
        # number and text of the answer's tokens that are not decoded again
        self._settled, self._settled_text = 0, ""

    def choose(self, logits: Tensor) -> int:  # (v,)
        """Return the next token."""
        if self.temperature == 0:
            return int(logits.argmax())
        if self._draws is None:
            self._draws = torch.Generator()
            self._draws.seed() if self.seed is None else self._draws.manual_seed(self.seed)
        p = ((logits.double().cpu() - logits.max().item()) / self.temperature).softmax(-1)
        if self.top_p < 1:
            ordered, order = p.sort(descending=True)
            p[order[ordered.cumsum(-1) - ordered >= self.top_p]] = 0
        return int(torch.multinomial(p, 1, generator=self._draws))

    def add(self, token: int, logits: Tensor, tokenizer: Any, ends: Sequence[int]) -> None:
        """Append a token, and send the part of the text that can no longer change."""
        if self.cancelled:
            self.done = True
            return
        ended = token in ends
        if not ended:
            self.tokens.append(token)
        if self.top is not None and not ended:
            self._waiting.append(_likelihood(token, logits, self.top))
        text = self._text(tokenizer)
        cut = min((at for word in self.stop if (at := text.find(word)) >= 0), default=-1)
        full = len(self.tokens) >= self.max_tokens
        finish = "stop" if ended or cut >= 0 else "length" if full else None
        if cut >= 0:
            text = text[:cut]
        elif finish is None:
            text = text[: max(len(text) - self._uncertain(text), 0)]
        self.done = finish is not None
        if len(text) > self._sent or self.done:
            part = Part(text[self._sent :], tuple(self._waiting), finish)
            self._sent, self._waiting = max(len(text), self._sent), []
            self.emit(part)

    def _text(self, tokenizer: Any) -> str:
        # decode after the end of the prompt: SentencePiece tokenizers drop the leading blank of a text on its own
        if self._before is None:
            numbers = range(1, 5) if self.follows else ()
            ends = ((ids, _decoded(tokenizer, ids)) for n in numbers if (ids := self.prompt[-n:]))
            self._before = next((end for end in ends if UNFINISHED not in end[1]), ([], ""))
            self._cleans = _cleans(tokenizer)
        (ids, before), new = self._before, self.tokens[self._settled :]
        whole = _decoded(tokenizer, ids + new)
        more = whole.removeprefix(before) if whole.startswith(before) else _decoded(tokenizer, new)
        text = self._settled_text + more
        last = self.tokens[-1:]
        end = _decoded(tokenizer, last) if len(new) >= AGAIN and not self._cleans else ""
        if end and UNFINISHED not in end and not text.endswith(UNFINISHED):
            self._before, self._settled, self._settled_text = (last, end), len(self.tokens), text
        return text

    def _uncertain(self, text: str) -> int:
        """Return how many characters at the end may still change, or may be the start of a stop string."""
        whole = text.rstrip(UNFINISHED)
        starts = (n for word in self.stop for n in range(len(word) - 1, 0, -1) if whole.endswith(word[:n]))
        return len(text) - len(whole) + max(*starts, CLEANED if self._cleans else 0, 0)


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


@cache  # once per tokenizer
def _cleans(tokenizer: Any) -> bool:
    """Whether a tokenizer removes blanks before punctuation, as those of some T5 models do."""
    ids = tokenizer("a .", add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids) != tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _likelihood(token: int, logits: Tensor, top: int) -> Likelihood:
    logprobs = logits.float().log_softmax(-1)
    best = logprobs.topk(min(top, len(logprobs))) if top else None
    likeliest = () if best is None else zip(best.indices.tolist(), best.values.tolist(), strict=True)
    possible = tuple((other, p) for other, p in likeliest if p > -math.inf)  # a forced token is the only one
    return Likelihood(token, logprobs[token].item(), possible)


def tell(answer: Answer, error: Exception) -> None:
    """End an answer with an error; the client may be gone."""
    answer.done = True
    try:
        answer.emit(error)
    except Exception as failed:
        log.warning("could not report the failure of a request to its client: %s", failed)


class Choosing(LogitsProcessor):
    """Let each row of a batch choose its own tokens, by masking all others; after its end, ``pad``.

    A row first repeats its tokens in ``again``, which were chosen before.
    """

    def __init__(
        self,
        answers: Sequence[Answer],
        tokenizer: Any,
        ends: Sequence[int],
        pad: int,
        again: Sequence[Sequence[int]],
    ) -> None:
        self.answers, self.tokenizer, self.ends, self.pad = answers, tokenizer, ends, pad
        self.again = again
        self.steps = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (b, s), (b, v) -> (b, v)
        """Return scores that allow one token in each row."""
        self.steps += 1
        chosen = torch.full_like(scores, -torch.inf)
        for row, (answer, logits) in enumerate(zip(self.answers, scores, strict=True)):
            token, before = self.pad, self.again[row]
            if self.steps <= len(before):
                token = before[self.steps - 1]
            elif not answer.done:
                try:
                    token = answer.choose(logits)
                    answer.add(token, logits, self.tokenizer, self.ends)
                except Exception as error:  # fails this request, not the others in the batch
                    tell(answer, error)
            chosen[row, token] = 0
        return chosen
