"""Judge which of two outputs is better, by a file of judgements or an OpenAI-compatible endpoint.

A pair is a row of AlpacaEval's annotations without a judgement: ``instruction``, ``output_1`` and ``generator_1`` of
the reference model, ``output_2`` and ``generator_2`` of the model. A judge returns the model's share of a win: 1, 0, a
number between, or None without a judgement.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...data.example import column
from ...storage.reading import naming
from ...suggest import needs_extra
from .win_rate import share_of_win

log = logging.getLogger(__name__)

Pair = Mapping[str, str]
PROMPT_VERSION = 1  # increase with every change of `question`: judgements are reused only for the same prompt
REFUSES_PAIR = (400, 413, 422)  # status codes about this request; all others concern every request
RETRIES = 5  # by the openai client, after rate limits, server errors and lost connections


class JudgeFailed(ConnectionError):
    """The judge cannot continue: no connection, no permission, no such model."""


class PairRefused(ConnectionError):
    """The judge refuses this pair because of its content or length; it may accept others."""


def look_up(pairs: Sequence[Pair], rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Return the share of a win that existing judgements give each pair; None without one.

    A row counts for a pair with exactly its texts, in either order: judgements of other outputs, even from another
    version of the same model, are not used.

    Raises:
        ValueError: if two rows contradict each other; names both, as only their author knows which is right.
    """
    judged: dict[tuple[str, str, str], tuple[float, int]] = {}  # texts -> share, row
    for i, row in enumerate(rows):
        with naming(f"judgement {i}"):
            instruction, first, second, preference = (
                column(row, name) for name in ("instruction", "output_1", "output_2", "preference")
            )
        share = share_of_win(preference, f"judgement {i}")
        if share is None:
            continue
        shares = {(instruction, first, second): share}
        shares.setdefault((instruction, second, first), 1 - share)  # equal outputs are one key
        for texts, mine in shares.items():
            known, at = judged.setdefault(texts, (mine, i))
            if not math.isclose(known, mine, abs_tol=1e-9):
                raise ValueError(
                    f"judgements {at} and {i} contradict each other on {instruction!r:.80}: "
                    f"{known:g} and {mine:g} of a win; keep one, or their mean as preference"
                )
    texts = [(pair["instruction"], pair["output_1"], pair["output_2"]) for pair in pairs]
    return [judged[key][0] if key in judged else None for key in texts]


class EndpointJudge:
    """A model served by an OpenAI-compatible ``/chat/completions`` at a URL such as ``http://localhost:8000/v1``.

    The key is sent as a bearer token, and never logged or written. Temperature and ``max_tokens`` are not sent if they
    are None, for models that reject them. ``settings`` holds everything that can change a judgement.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        temperature: float | None = 0.0,
        max_tokens: int | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url must start with http:// or https://; got {url!r}")
        with needs_extra("judge", "judge=endpoint needs the openai client"):
            import openai
        self.url = url.rstrip("/").removesuffix("/chat/completions")
        self.name = model  # recorded as AlpacaEval's `annotator`
        # without a key the client would send that of OPENAI_API_KEY, to any url
        self._client = openai.OpenAI(base_url=self.url, api_key=key or "none", max_retries=RETRIES)
        given = {"temperature": temperature, "max_tokens": max_tokens}
        self._given: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        settings = {"judge": "endpoint", "url": self.url, "model": model, **given, "prompt": PROMPT_VERSION}
        self.settings: Mapping[str, Any] = settings

    def __call__(self, pair: Pair) -> float | None:
        """Ask for a verdict; None if the reply is not one.

        Raises:
            PairRefused: if the endpoint refuses this request (400, 413, 422).
            JudgeFailed: if it refuses all (401, 404, ...), or cannot be reached.
        """
        from openai import APIConnectionError, APIStatusError

        model_first = is_model_first(pair["instruction"])
        messages: Any = [{"role": "user", "content": question(pair, model_first)}]
        try:
            reply = self._client.chat.completions.create(model=self.name, messages=messages, **self._given)
            text = reply.choices[0].message.content or ""
        except APIStatusError as error:
            said = error.response.text.strip()[:200] or "nothing"
            message = f"{self.url} answered {error.status_code}: {said}"
            if error.status_code in REFUSES_PAIR:
                raise PairRefused(message) from error
            if error.status_code in (401, 403):
                message += "; does the variable given by key_env contain the key?"
            raise JudgeFailed(message) from error
        except APIConnectionError as error:
            raise JudgeFailed(f"cannot reach {self.url} ({error.__cause__ or error})") from error
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise JudgeFailed(f"{self.url} did not answer with a chat completion ({error})") from error
        verdict = parse_verdict(text)
        if verdict is None:
            log.warning(
                "%s gave no verdict on %r; it replied %r", self.name, pair["instruction"][:60], text[:80]
            )
            return None
        return 0.5 if verdict == 0 else float((verdict == 1) == model_first)


def is_model_first(instruction: str) -> bool:
    """Return whether the model's output is shown first: drawn from the instruction, so equal for every model."""
    return hashlib.sha256(instruction.encode("utf-8", "surrogatepass")).digest()[0] % 2 == 1


def question(pair: Pair, model_first: bool) -> str:
    """Return the judge's prompt for a pair."""
    first, second = (pair[f"output_{i}"] for i in ((2, 1) if model_first else (1, 2)))
    return (
        "Two answers to one instruction follow. Decide which of them a careful reader would prefer: the one that "
        "does what the instruction asks, correctly, completely and clearly. Neither length nor the order in which "
        "they stand counts.\n\n"
        f"Instruction:\n{pair['instruction']}\n\nAnswer 1:\n{first}\n\nAnswer 2:\n{second}\n\n"
        "Reply with one character: 1 if answer 1 is better, 2 if answer 2 is better, 0 if neither is."
    )


_VERDICT = re.compile(r"(?:(?:final )?(?:answer|verdict|winner|output|response)\s*:?\s*)?(0|1|2|tie|draw)")


def parse_verdict(text: str) -> int | None:
    r"""Return 1, 2 or 0 (neither) if the last line of a reply is only that; else None.

    >>> parse_verdict(" **2**"), parse_verdict("Both are fine.\nVerdict: 0"), parse_verdict("1 beats 2")
    (2, 0, None)
    """
    lines = text.rpartition("</think>")[2].split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    found = _VERDICT.fullmatch(last.lower().strip(" \t\r*_`'\"()[]."))
    return None if found is None else {"1": 1, "2": 2}.get(found[1], 0)
