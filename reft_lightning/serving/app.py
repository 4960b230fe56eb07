"""The HTTP side: routes, errors, streams, and limits of requests."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from base64 import b64decode
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from ..data.encoding import Encoded
from ..data.example import Example
from ..data.pictures import Picture
from ..runs.kinds import KINDS
from ..runs.prompting import PromptFormat
from ..suggest import did_you_mean
from .answers import Answer, Likelihood, Part
from .engine import Busy, Engine
from .protocol import ChatRequest, Message, TextRequest, Writer, failure, usage

log = logging.getLogger(__name__)

MAX_BODY = 4_000_000  # bytes
MAX_BODY_SEEN, MAX_PICTURES = 20_000_000, 16  # for a model that reads pictures
MAX_PIXELS = 50_000_000  # of all pictures together: a few bytes may decompress to gigabytes
ANSWER = 256  # tokens, if a request sets no limit
PATIENCE = 3  # s for answers in progress at shutdown; then they end with an error


@dataclass(frozen=True)
class Served:
    """One model name that requests may use."""

    adapter: str | None  # the model's name for the adapter; None for the base
    prompts: PromptFormat | None = None  # the prompt format it was trained on; None if unknown


class Refused(Exception):
    """A request that cannot be answered, with its HTTP status."""

    def __init__(self, message: str, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def build_app(engine: Engine, served: Mapping[str, Served], token: str | None = None) -> FastAPI:
    """Return the application; the engine closes with it.

    ``served`` maps the names that requests may use to models. With a ``token``, clients must send ``Authorization:
    Bearer TOKEN``.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    # one at a time, as some tokenizers, such as NLLB's, change their settings for each text
    reading = asyncio.Lock()
    app = FastAPI(title="reft-serve", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        if token is not None and request.url.path != "/health":
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), token.encode()):
                return JSONResponse(failure("wrong or missing token", code="invalid_api_key"), 401)
        if request.method == "POST":
            length = request.headers.get("content-length", "")
            if not length.isdecimal() or "transfer-encoding" in request.headers:
                return JSONResponse(failure("a request must have a Content-Length header"), 411)
            most = MAX_BODY_SEEN if engine.sees else MAX_BODY
            if int(length) > most:
                return JSONResponse(failure(f"a request may have at most {most:,} bytes"), 413)
        return await call_next(request)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(failure(_said(error)), 400)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return JSONResponse(failure(str(error), code=error.code), error.status)

    @app.exception_handler(HTTPException)
    async def elsewhere(request: Request, error: HTTPException) -> JSONResponse:
        said, path = str(error.detail), request.url.path
        if error.status_code == 404:
            paths = [str(getattr(route, "path", "")) for route in app.routes]
            said = f"there is nothing at {path}{did_you_mean(path, paths)}"
        return JSONResponse(failure(said), error.status_code, error.headers)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name) for name in served]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _known(name)
        return _model(name)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        model = _known(body.model)
        return await answer(body, request, model, lambda: _asked(engine, model, body.messages))

    @app.post("/v1/completions")
    async def complete(body: TextRequest, request: Request) -> Response:
        model = _known(body.model)
        example = Example("prompt", body.prompt, target="-", answer="-")
        return await answer(body, request, model, lambda: engine.encode(example))

    def _known(name: str) -> Served:
        if name not in served:
            raise Refused(
                f"model must be one of {', '.join(served)}; got {name!r}{did_you_mean(name, served)}",
                404, "model_not_found",
            )  # fmt: skip
        return served[name]

    async def answer(
        body: ChatRequest | TextRequest, request: Request, model: Served, read: Callable[[], Encoded]
    ) -> Response:
        try:
            async with reading:
                asked = await asyncio.to_thread(read)  # a long prompt takes seconds
        except ValueError as error:
            raise Refused(str(error)) from error
        ids = asked.prompt_ids
        room = engine.room(len(ids))
        limit = body.limit or min(ANSWER, max(room, 1))
        if not ids:
            raise Refused("the prompt is empty")
        if engine.alone and body.strength != 1:
            raise Refused("this adapter changes the base model itself, so strength must be 1")
        if limit > room:
            most = "the prompt and the answer together"
            if engine.two_texts:
                most = f"the prompt, and {engine.context - 1} of the answer"
            raise Refused(
                f"this model reads at most {engine.context} tokens of {most}; the prompt has {len(ids)}, and up to "
                f"{limit} were requested for the answer",
                code="context_length_exceeded",
            )
        loop, parts = asyncio.get_running_loop(), asyncio.Queue[Part | Exception]()
        wanted = Answer(
            ids, lambda part: loop.call_soon_threadsafe(parts.put_nowait, part), model.adapter,
            strength=body.strength, max_tokens=limit, temperature=body.temperature, top_p=body.top_p, seed=body.seed,
            stop=body.stops, follows=not engine.two_texts, top=body.top,
            seen=asked if engine.sees else None,
        )  # fmt: skip
        try:
            engine.submit(wanted)
        except Busy as error:
            return JSONResponse(failure(str(error), "server_error"), 503, {"Retry-After": "1"})
        writer = Writer(body, engine.tokenizer)
        if body.stream:
            return StreamingResponse(_stream(wanted, parts, writer), media_type="text/event-stream")
        return await _whole(wanted, parts, writer, request)

    return app


class Server(uvicorn.Server):
    """A server that ends answers itself before uvicorn drops their connections without telling clients."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        config.timeout_graceful_shutdown = PATIENCE + 2
        super().__init__(config)
        self.engine = engine

    async def shutdown(self, sockets: list[Any] | None = None) -> None:
        """Wait for the answers in progress, then end them with an error."""
        telling = asyncio.create_task(self._tell())
        await super().shutdown(sockets)
        telling.cancel()

    async def _tell(self) -> None:
        await asyncio.sleep(PATIENCE)
        await asyncio.to_thread(self.engine.close)


async def _whole(
    answer: Answer, parts: asyncio.Queue[Part | Exception], writer: Writer, request: Request
) -> Response:
    texts: list[str] = []
    likelihoods: list[Likelihood] = []
    gone = asyncio.create_task(_disconnected(request))
    try:
        while True:
            waiting = asyncio.create_task(parts.get())
            await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                waiting.cancel()
                return Response(status_code=499)  # the client is gone
            part = waiting.result()
            if isinstance(part, Exception):
                status = 503 if isinstance(part, Busy) else 500
                return JSONResponse(failure(f"{type(part).__name__}: {part}", "server_error"), status)
            texts.append(part.text)
            likelihoods += part.likelihoods
            if part.finish is not None:
                whole = Part("".join(texts), tuple(likelihoods), part.finish)
                return JSONResponse(writer.whole(whole, usage(len(answer.prompt), len(answer.tokens))))
    finally:
        answer.cancelled = not answer.done
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(
    answer: Answer, parts: asyncio.Queue[Part | Exception], writer: Writer
) -> AsyncIterator[str]:
    try:
        first = True
        while True:
            part = await parts.get()
            if isinstance(part, Exception):
                yield _event(failure(f"{type(part).__name__}: {part}", "server_error"))
                return
            yield _event(writer.piece(part, first))
            first = False
            if part.finish is not None:
                break
        if writer.request.usage_at_end:
            yield _event(writer.body([], usage(len(answer.prompt), len(answer.tokens)), chunk=True))
        yield "data: [DONE]\n\n"
    finally:  # also if the client disconnected
        answer.cancelled = not answer.done


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "reft_lightning"}


def _said(error: RequestValidationError) -> str:
    """Return in one line what is wrong with a request body, suggesting the closest name for a misspelt key."""
    said = []
    for one in error.errors()[:3]:
        where = ".".join(str(part) for part in one["loc"] if part != "body") or "the body"
        if one["type"] == "json_invalid":
            said.append(f"the body is not JSON: {one['msg']}")
        elif one["type"] == "model_attributes_type" and where == "the body":
            hint = "send a JSON object, with the header Content-Type: application/json"
            said.append(f"{where}: {one['msg']}; {hint}")
        elif one["type"] == "extra_forbidden":
            known = {**ChatRequest.model_fields, **TextRequest.model_fields}
            said.append(f"{where} is not a supported option{did_you_mean(where, known)}")
        else:
            said.append(f"{where}: {one['msg']}")
    return "; ".join(said)


def _asked(engine: Engine, model: Served, messages: list[Message]) -> Encoded:
    """Return a conversation as the model reads it, in the prompt format that the adapter was trained on."""
    turns = [(message.role, message.text) for message in messages]
    urls = [url for message in messages for url in message.pictures]
    if urls and not engine.sees:
        raise Refused("this model reads text only: leave out the pictures")
    kind = KINDS["vision" if engine.sees else "generation"]
    prompts = replace(model.prompts or PromptFormat("chat"), kind=kind)
    system = turns.pop(0)[1] if turns[0][0] == "system" else prompts.system_prompt
    if prompts.template == "chat":
        if engine.reader.chat_template is None:
            raise Refused("this model has no chat template; use /v1/completions")
        if not turns or turns[-1][0] != "user":
            raise Refused("the last message must be the user's, which the model answers")
        if system:
            turns.insert(0, ("system", system))
    else:
        if len(turns) != 1 or turns[0][0] != "user":
            raise Refused(
                f"this adapter was trained on single questions (data.template={prompts.template}): send one user "
                "message, or use /v1/completions"
            )
        if system:
            raise Refused(f"data.template={prompts.template} does not support a system message: leave it out")
    *before, (_, question) = turns
    prompts = replace(prompts, system_prompt=None)  # the system prompt is already one of the turns
    return engine.encode(prompts.prompt(question, engine.reader, before, _pictures(urls)))


def _pictures(urls: list[str]) -> list[Picture]:
    if len(urls) > MAX_PICTURES:
        raise Refused(f"a request may have at most {MAX_PICTURES} pictures; got {len(urls)}")
    found = []
    for i, url in enumerate(urls):
        try:
            found.append(Picture(str(i + 1), data=b64decode(url, validate=True), sent=True))
        except ValueError as error:
            raise Refused(f"the picture '{i + 1}' is not valid base64: {error}") from error
    if (pixels := sum(picture.pixels for picture in found)) > MAX_PIXELS:
        raise Refused(f"the pictures may have at most {MAX_PIXELS:,} pixels together; got {pixels:,}")
    return found
