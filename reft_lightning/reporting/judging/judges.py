"""Who says which of two outputs is better: a file of judgements, an OpenAI-compatible endpoint, a local model.

A judge is called with a pair and the order in which it sees the two, and answers how much of a win it is for the
model: 1, 0, something between, or None where no judgement was to be had. The command around them is `judge.py`.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import math
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...data.example import column
from ...evaluation.win_rate import share_of_win

log = logging.getLogger(__name__)

PROMPT_VERSION = 1  # raise with every change of `question`: judgements are reused for the same prompt alone


@dataclass(frozen=True)
class Pair:
    """What a model and the reference model said to one instruction.

    Args:
        instruction: what both were asked.
        output: of the model.
        reference_output: of the reference model.
        generator: name of the model.
        reference: name of the reference model.
        dataset: part of AlpacaEval that the instruction comes from.
    """

    instruction: str
    output: str
    reference_output: str
    generator: str
    reference: str
    dataset: str = ""


class Judge(Protocol):
    """Compares two outputs."""

    name: str  # recorded as AlpacaEval's `annotator`

    @property
    def settings(self) -> Mapping[str, Any]:
        """Everything that can change a judgement: equal settings may reuse one."""
        ...

    def __call__(self, pair: Pair, model_first: bool) -> float | None:
        """Return how much of a win it is for the model (0..1), or None."""
        ...


class JudgeFailed(ConnectionError):
    """The judge cannot go on: no connection, no permission, no such model."""


class PairRefused(ConnectionError):
    """The judge refuses this pair, by its content or length; others may pass."""


def question(instruction: str, first: str, second: str) -> str:
    """Return what a language model is asked."""
    return (
        "Two answers to one instruction follow. Decide which of them a careful reader would prefer: the one that "
        "does what the instruction asks, correctly, completely and clearly. Neither length nor the order in which "
        "they stand counts.\n\n"
        f"Instruction:\n{instruction}\n\nAnswer 1:\n{first}\n\nAnswer 2:\n{second}\n\n"
        "Reply with one character: 1 if answer 1 is better, 2 if answer 2 is better, 0 if neither is."
    )


def ask(pair: Pair, model_first: bool) -> str:
    """Return the question about a pair in one order."""
    outputs = (pair.output, pair.reference_output)
    return question(pair.instruction, *(outputs if model_first else outputs[::-1]))


_VERDICT = re.compile(r"(?:(?:final )?(?:answer|verdict|winner|output|response)\s*:?\s*)?(0|1|2|tie|draw)")


def parse_verdict(text: str) -> int | None:
    r"""Return 1, 2 or 0 (neither) where the reply, or its last line, says nothing else; None otherwise.

    >>> parse_verdict(" **2**"), parse_verdict("Both are fine.\nVerdict: 0"), parse_verdict("1 beats 2")
    (2, 0, None)
    """
    lines = [line for line in text.rpartition("</think>")[2].splitlines() if line.strip()]
    found = _VERDICT.fullmatch(lines[-1].lower().strip(" \t*_`'\"()[].")) if lines else None
    if found is None:
        return None
    return 0 if found[1] in ("tie", "draw") else int(found[1])


# ----------------------------------------------------------------------------------------------- from a file


class FileJudge:
    """Judgements that someone else made: AlpacaEval's annotations, or what `reft-judge` wrote.

    A row counts for a pair whose texts it has, in either order: judgements of other outputs, also of another
    version of the same model, are never used. Rows with the same texts must agree: which of two judgements holds,
    or whether they are two orders to average, only their maker knows.

    Args:
        rows: {instruction, output_1, output_2, preference}; None as preference says nothing.
        name: who judged.

    Raises:
        ValueError: if two rows contradict each other; names both.
    """

    def __init__(self, rows: list[Mapping[str, Any]], name: str) -> None:
        self.name = name
        self.instructions: set[str] = set()
        self._judged: dict[tuple[str, str, str], tuple[float, int]] = {}  # texts -> share, row
        digest = hashlib.sha256()
        for i, row in enumerate(rows):
            where = f"judgement {i}"
            names = ("instruction", "output_1", "output_2", "preference")
            instruction, first, second, preference = (column(row, name, where) for name in names)
            digest.update(json.dumps([instruction, first, second, preference]).encode())
            share = share_of_win(preference, where)
            self.instructions.add(instruction)
            if share is None:
                continue
            shares = {(instruction, first, second): share}
            shares.setdefault((instruction, second, first), 1 - share)  # equal outputs are one key
            for texts, mine in shares.items():
                known, at = self._judged.setdefault(texts, (mine, i))
                if not math.isclose(known, mine, abs_tol=1e-9):
                    raise ValueError(
                        f"judgements {at} and {i} contradict each other: {known:g} and {mine:g} of a win for the same "
                        f"output on {instruction!r:.80}; keep one of them, or their mean as preference"
                    )
        self._digest = digest.hexdigest()[:16]

    @property
    def settings(self) -> dict[str, Any]:
        """Whose judgements, and which."""
        return {"judge": "file", "name": self.name, "sha256": self._digest}

    def __call__(self, pair: Pair, model_first: bool) -> float | None:
        """Look the pair up; None where it is not there."""
        share, _ = self._judged.get((pair.instruction, pair.reference_output, pair.output), (None, None))
        return share


# --------------------------------------------------------------------------------------------- over an endpoint

ROW_ERRORS = (400, 413, 422)  # of this request; other 4xx concern the whole endpoint
RETRIED = (408, 409, 425, 429)
LONGEST_WAIT = 60.0  # s


class EndpointJudge:
    """A model behind an OpenAI-compatible `/chat/completions`.

    Args:
        url: up to and without `/chat/completions`, such as `https://api.openai.com/v1`.
        model: as the endpoint names it.
        key: sent as bearer token; None for servers without one. Never logged or written.
        temperature: None leaves it out, for models that refuse it.
        max_tokens: of the reply; None leaves it out.
        timeout: seconds a request.
        attempts: requests for one judgement before giving up.
        wait: seconds before the second attempt; doubled each time, at most 60. `Retry-After` overrules it.
        sleep: for tests.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        *,
        temperature: float | None = 0.0,
        max_tokens: int | None = None,
        timeout: float = 60.0,
        attempts: int = 5,
        wait: float = 1.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://; got {url!r}")
        if attempts < 1:
            raise ValueError(f"attempts must be 1 or more; got {attempts}")
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model, self.name = model, model
        self._key, self.temperature, self.max_tokens = key, temperature, max_tokens
        self.timeout, self.attempts, self.wait, self._sleep = timeout, attempts, wait, sleep

    @property
    def settings(self) -> dict[str, Any]:
        """What decides a reply."""
        return {
            "judge": "endpoint",
            "url": self.url,
            "model": self.model,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "prompt": PROMPT_VERSION,
        }

    def __call__(self, pair: Pair, model_first: bool) -> float | None:
        """Ask; a reply that is no verdict is asked for again, and None in the end.

        Raises:
            PairRefused: if the endpoint refuses this request (400, 413, 422).
            JudgeFailed: if it refuses all (401, 404, ...), or cannot be reached after every attempt.
        """
        body = {"model": self.model, "messages": [{"role": "user", "content": ask(pair, model_first)}]}
        body |= {} if self.temperature is None else {"temperature": self.temperature}
        body |= {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        trouble, reply = "", None
        for attempt in range(self.attempts):
            try:
                reply = self._post(body)
            except _Retry as error:
                trouble = str(error)
                if attempt + 1 < self.attempts:
                    log.warning("%s; attempt %d of %d follows", trouble, attempt + 2, self.attempts)
                    self._sleep(min(error.after or self.wait * 2**attempt, LONGEST_WAIT))
                continue
            verdict = parse_verdict(reply)
            if verdict is not None:
                return 0.5 if verdict == 0 else float((verdict == 1) == model_first)
        if reply is None:
            raise JudgeFailed(f"{trouble}; gave up after {self.attempts} attempts")
        log.warning("%s gave no verdict on %r but %r", self.model, pair.instruction[:60], reply[:80])
        return None

    def _post(self, body: dict[str, Any]) -> str:
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self._key}"} if self._key else {}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        try:
            with _OPENER.open(request, timeout=self.timeout) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            with error:
                said = error.read().decode("utf-8", "replace").strip()[:200]
            message = f"{self.url} answered {error.code} {error.reason}: {said or 'nothing'}"
            if error.code in RETRIED or error.code >= 500:
                raise _Retry(message, _seconds(error.headers.get("Retry-After"))) from error
            if error.code in ROW_ERRORS:
                raise PairRefused(message) from error
            hint = "; is the key in the variable that key_env names?" if error.code in (401, 403) else ""
            raise JudgeFailed(message + hint) from error
        except (OSError, http.client.HTTPException) as error:  # URLError, timeouts, connections that break
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            raise _Retry(f"{self.url} cannot be reached ({reason})") from error
        try:
            reply = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise _Retry(f"{self.url} answered no chat completion: {content[:80]!r}") from error
        return reply or ""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow no redirection: urllib would send the key along, and turn the question into a GET."""


_OPENER = urllib.request.build_opener(_NoRedirect)


class _Retry(ConnectionError):
    def __init__(self, message: str, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after


def _seconds(header: str | None) -> float | None:
    # the header may also hold a date, which is left to the doubling wait
    return float(header) if header and re.fullmatch(r"\d+(\.\d+)?", header.strip()) else None


# ------------------------------------------------------------------------------------------- by a local model


class ModelJudge:
    r"""A Hugging Face causal language model on this machine.

    It says no word: :math:`w = p(\text{model's digit}) / (p(1) + p(2))` where the reply begins, so every pair gets a
    judgement and a model in doubt gives a half. Small models like one place better: ask in both orders.

    Args:
        model: a causal language model.
        tokenizer: its chat template is used if it has one, else Alpaca's.
        name: recorded as the judge.
        max_length: tokens; None takes what the model was made for.
        place: where it was loaded from, part of its settings.

    Raises:
        ValueError: if max_length is None and the model's configuration does not say it.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        max_length: int | None = None,
        place: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.name, self.place = model, tokenizer, name, dict(place or {})
        self.max_length = max_length or _tokens_read(model, name)
        self.template = "chat" if tokenizer.chat_template else "alpaca"

    @classmethod
    def load(cls, name: str, max_length: int | None = None, **place: Any) -> ModelJudge:
        """Load it as `base_models.load_base_model` does, onto the GPU if there is one."""
        import torch

        from ...base_models.loading import load_base_model

        model, tokenizer = load_base_model(**place)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(model.to(device), tokenizer, name, max_length, place)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides its probabilities."""
        return {
            **self.place,
            "judge": "model",
            "model": self.name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "template": self.template,
            "max_length": self.max_length,
            "prompt": PROMPT_VERSION,
        }

    def __call__(self, pair: Pair, model_first: bool) -> float | None:
        """Compare the likelihood of the two digits.

        Raises:
            PairRefused: if the question is longer than the model reads.
        """
        import torch

        from ...data.encoding import encode
        from ...data.example import Example
        from ...data.prompts import apply_template

        examples = [Example("judge", ask(pair, model_first), digit, digit) for digit in "12"]
        texts = apply_template(self.template, examples, self.tokenizer)
        first, second = (encode(self.tokenizer, example, self.max_length) for example in texts)
        if first.cut_prompt or second.cut_prompt:
            raise PairRefused(
                f"the question has {len(first) + first.cut_prompt} tokens, {self.name} reads {self.max_length}"
            )
        # some tokenizers put the same token, a space, in front of both digits
        at = next(
            i for i, (a, b) in enumerate(zip(first.target_ids, second.target_ids, strict=False)) if a != b
        )
        ids = torch.tensor([first.prompt_ids + first.target_ids[:at]], device=self.model.device)
        with torch.no_grad():
            logits = self.model(input_ids=ids, logits_to_keep=1).logits[0, -1].float()
        p_first = float(logits[[first.target_ids[at], second.target_ids[at]]].softmax(-1)[0])
        return p_first if model_first else 1 - p_first


def _tokens_read(model: Any, name: str) -> int:
    config = model.config.get_text_config()
    try:
        return config.max_position_embeddings
    except AttributeError as error:
        raise ValueError(
            f"the configuration of {name} ({config.model_type}) does not say how many tokens it reads (it has no "
            "max_position_embeddings): write max_length=N"
        ) from error


def annotator_of(rows: list[Mapping[str, Any]], path: Path) -> str:
    """Return who judged the rows of a file: their `annotator`, else the file's name.

    Raises:
        ValueError: if several did.
    """
    names = sorted({str(row["annotator"]) for row in rows if row.get("annotator")})
    if len(names) > 1:
        raise ValueError(f"{path} holds judgements by {', '.join(names)}; one file, one judge")
    return names[0] if names else path.name
