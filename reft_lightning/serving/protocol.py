"""The supported requests of OpenAI's API, and the format of the answers."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..data.pictures import MARK
from .answers import UNFINISHED, Likelihood, Part

MAX_TEXT = 1_000_000  # characters
MAX_TURNS = 10_000  # of a conversation
Stop = Annotated[str, Field(max_length=200)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")  # an option that has no effect is an error

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """Treat null as an option that is not given."""
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


class _Request(_Body):
    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: dict[str, bool] | None = None
    n: Literal[1] = 1  # many clients send this and the next two with their defaults
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    strength: Annotated[float, Field(ge=-100, le=100)] = 1.0  # our extension: of the adapter's edits
    user: str | None = None  # accepted but not used, like the next
    metadata: dict[str, str] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, before which the answer ends."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)

    @property
    def usage_at_end(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool((self.stream_options or {}).get("include_usage"))


class _Text(_Body):
    type: Literal["text"]
    text: Annotated[str, Field(max_length=MAX_TEXT)]


class _Url(_Body):
    url: str
    detail: Literal["auto"] = "auto"

    @field_validator("url")
    @classmethod
    def _holds_a_picture(cls, url: str) -> str:
        if not re.match("data:image/[^,]*;base64,", url):
            raise ValueError(
                f"must contain the picture, as data:image/png;base64,...; nothing is downloaded; got {url:.60}"
            )
        return url


class _Image(_Body):
    type: Literal["image_url"]
    image_url: _Url


class Message(_Body):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: list[Annotated[_Text | _Image, Field(discriminator="type")]]
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _in_parts(cls, content: Any) -> Any:
        if not isinstance(content, str | list):
            raise ValueError("must be a string, or a list of parts")
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @property
    def text(self) -> str:
        """The text of all parts, one per line, with a mark for each picture."""
        return "\n".join(part.text if isinstance(part, _Text) else MARK for part in self.content)

    @property
    def pictures(self) -> list[str]:
        """The contents of the pictures' data: URLs, in base64."""
        return [part.image_url.url.partition(",")[2] for part in self.content if isinstance(part, _Image)]


class ChatRequest(_Request):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_TURNS)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def top(self) -> int | None:
        """Number of most likely tokens to report."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        """Maximum number of tokens of the answer."""
        return self.max_completion_tokens or self.max_tokens


class TextRequest(_Request):
    """``POST /v1/completions``."""

    prompt: Annotated[str, Field(max_length=MAX_TEXT)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] = False
    best_of: Literal[1] = 1

    @property
    def top(self) -> int | None:
        """Number of most likely tokens to report."""
        return self.logprobs

    @property
    def limit(self) -> int | None:
        """Maximum number of tokens of the answer."""
        return self.max_tokens


class Writer:
    """Write the answer to one request, whole or in pieces; the tokenizer spells the tokens of log-probabilities."""

    def __init__(self, request: ChatRequest | TextRequest, tokenizer: Any) -> None:
        self.request, self.tokenizer = request, tokenizer
        self.chat = isinstance(request, ChatRequest)
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def body(
        self, choices: list[dict[str, Any]], usage: dict[str, int] | None, chunk: bool
    ) -> dict[str, Any]:
        """Return the body of a whole answer or of a piece."""
        kind = "text_completion"
        if self.chat:
            kind = "chat.completion.chunk" if chunk else "chat.completion"
        found = {"id": self.id, "object": kind, "created": self.created, "model": self.request.model}
        return {**found, "choices": choices, **({"usage": usage} if usage is not None else {})}

    def whole(self, answer: Part, usage: dict[str, int]) -> dict[str, Any]:
        """Return the answer to a request without a stream."""
        message = {"message": {"role": "assistant", "content": answer.text}}
        return self.body([self._choice(answer, message)], usage, chunk=False)

    def piece(self, part: Part, first: bool) -> dict[str, Any]:
        """Return one piece of a stream."""
        delta = {"role": "assistant", "content": part.text} if first else {"content": part.text}
        return self.body([self._choice(part, {"delta": delta})], None, chunk=True)

    def _choice(self, part: Part, of_chat: dict[str, Any]) -> dict[str, Any]:
        content = of_chat if self.chat else {"text": part.text}
        logprobs = self._logprobs(part.likelihoods)
        return {"index": 0, **content, "finish_reason": part.finish, "logprobs": logprobs}

    def _logprobs(self, likelihoods: Sequence[Likelihood]) -> dict[str, Any] | None:
        if self.request.top is None:
            return None
        if self.chat:
            content = [
                self._spelt(one.token, one.logprob) | {"top_logprobs": [self._spelt(*t) for t in one.top]}
                for one in likelihoods
            ]
            return {"content": content}
        return {
            "tokens": [self._spell(one.token) for one in likelihoods],
            "token_logprobs": [one.logprob for one in likelihoods],
            # of tokens with the same text, such as parts of characters, the most likely wins
            "top_logprobs": [{self._spell(token): p for token, p in one.top[::-1]} for one in likelihoods],
        }

    def _spell(self, token: int) -> str:
        """Return the text of a token in mid-text: SentencePiece tokenizers drop the leading blank of the first."""
        return self.tokenizer.decode([token, token]).removeprefix(self.tokenizer.decode([token]))

    def _spelt(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._spell(token)
        # a part of a character has no bytes here
        return {
            "token": text,
            "logprob": logprob,
            "bytes": None if UNFINISHED in text else list(text.encode()),
        }


def usage(prompt: int, answer: int) -> dict[str, int]:
    """Return the token counts."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def failure(message: str, kind: str = "invalid_request_error", code: str | None = None) -> dict[str, Any]:
    """Return an error in OpenAI's format."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
