"""HTTP: routes, errors, streaming, and clients that disconnect."""

import asyncio
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from unimoe.errors import UserError
from unimoe.model.modeling import UniMoeForConditionalGeneration
from unimoe.model.processing import UniMoeProcessor

from .answer import Answer, Delta
from .engine import Engine, EngineConfig, QueueFull
from .media import MediaLimits, MediaReader
from .metrics import Metrics
from .protocol import ChatRequest, Completion, error_body, usage

POLL_SECONDS = 0.2
"""Seconds between two checks whether a client without a new delta is still connected."""

CHARACTERS_PER_TOKEN = 32
"""Text with more characters than this per token of context is refused before it is tokenized."""


@dataclass(frozen=True)
class ServerConfig:
    """Name, access and limits of a server."""

    name: str
    """The model's name in requests and responses."""
    api_key: str | None = None
    """Bearer token that ``/v1`` requires; None for open access."""
    trusted_hosts: list[str] = field(default_factory=lambda: ["*"])
    """Accepted Host headers. On localhost this stops web pages from reaching the server by DNS rebinding."""
    body_bytes: int = 48 << 20
    """Largest request body."""
    max_prompt_tokens: int | None = None
    """Longest prompt, media tokens included; None for the LLM's context length."""
    max_new_tokens: int = 1024
    """Longest answer, and the default of requests that set no maximum."""
    media: MediaLimits = field(default_factory=MediaLimits)
    engine: EngineConfig = field(default_factory=EngineConfig)


class EngineError(Exception):
    """The model failed on this request."""


class Service:
    """Model, engine and limits behind the routes."""

    def __init__(
        self, model: UniMoeForConditionalGeneration, processor: UniMoeProcessor, config: ServerConfig
    ):
        self.model = model
        self.processor = processor
        self.config = config
        self.media = MediaReader(list(processor.modalities), config.media)
        self.engine = Engine(model, config.engine)
        self.metrics = Metrics(self.engine)
        self.context: int = getattr(model.config.text_config, "max_position_embeddings", None) or 1 << 20

    def check(self, request: ChatRequest):
        """Validate a request before anything is computed.

        Raises:
            HTTPException: 404 for another model's name.
            UserError: a field this server does not support.
        """
        if request.model not in (None, self.config.name):
            found = f"the model {request.model!r} is not served here, only {self.config.name!r}"
            raise HTTPException(404, {"message": found, "code": "model_not_found", "param": "model"})
        request.check()

    async def start(self, request: ChatRequest, on_delta: Callable[[Delta], None]) -> Answer:
        """Prepare the request and submit it to the engine.

        Raises:
            QueueFull: the engine has no place for it.
            UserError: the input is invalid.
        """
        self.engine.reserve()
        try:
            answer = await run_in_threadpool(self._prepare, request, on_delta)
        except BaseException:
            self.engine.release()
            raise
        self.engine.submit(answer)
        return answer

    def _prepare(self, request: ChatRequest, on_delta: Callable[[Delta], None]) -> Answer:
        most = min(self.config.max_prompt_tokens or self.context, self.context)
        self._check_length(request.characters() // CHARACTERS_PER_TOKEN, most)
        messages = self.media.read(request.messages)
        encoded = self.processor.encode(messages, add_generation_prompt=True, where="messages")
        length = len(encoded["input_ids"])
        self._check_length(length, most)
        defaults = self.model.generation_config
        sampling = request.sampling(defaults, self.config.max_new_tokens, self.context - length)
        return Answer(
            self.model, self.processor.tokenizer, self.processor.pad([encoded], "left"), sampling, on_delta
        )

    def _check_length(self, tokens: int, most: int):
        if tokens > most:
            found = f"the prompt has {tokens} tokens or more; at most {most} are taken"
            code = "context_length_exceeded"
            raise HTTPException(400, {"message": found, "code": code, "param": "messages"})


class Client:
    """Passes the deltas of one answer from the engine's thread to the event loop."""

    def __init__(self, request: Request, metrics: Metrics):
        self.request = request
        self.metrics = metrics
        self.begin = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Delta] = asyncio.Queue()

    def put(self, delta: Delta) -> None:
        """Called on the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, delta)
        except RuntimeError:
            pass  # the loop has ended, and the client with it

    async def deltas(self, answer: Answer) -> AsyncIterator[Delta]:
        """All deltas. Cancels the answer if the client disconnects or the caller stops iterating."""
        how, first = "cancelled", True
        try:
            while True:
                try:
                    delta = await asyncio.wait_for(self._queue.get(), POLL_SECONDS)
                except TimeoutError:
                    delta = None
                if await self.request.is_disconnected():
                    answer.cancel()
                if delta is None:
                    continue
                if first:
                    self.metrics.first.observe(time.monotonic() - self.begin)
                    first = False
                if delta.error:
                    how = "error"
                    raise EngineError from delta.error
                how = delta.finish_reason or how
                yield delta
                if delta.finish_reason:
                    return
        finally:
            answer.cancel()
            self.metrics.answers.labels(how).inc()
            self.metrics.prompt_tokens.inc(answer.prompt_tokens)
            self.metrics.answer_tokens.inc(len(answer.tokens))
            self.metrics.whole.observe(time.monotonic() - self.begin)


def build_app(
    model: UniMoeForConditionalGeneration, processor: UniMoeProcessor, config: ServerConfig
) -> FastAPI:
    """The application. Its lifespan ends the engine."""
    service = Service(model, processor, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        yield
        await run_in_threadpool(service.engine.close)

    app = FastAPI(title="unimoe", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(Gate, config=config)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=config.trusted_hosts)
    _add_error_handlers(app, service.metrics)

    @app.get("/health")
    async def health():
        if not service.engine.alive:
            raise HTTPException(503, "the engine has stopped")
        return {"status": "ok", "model": config.name}

    @app.get("/metrics")
    async def metrics():
        return Response(service.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models():
        card = {"id": config.name, "object": "model", "created": int(time.time()), "owned_by": "unimoe"}
        return {"object": "list", "data": [card]}

    @app.post("/load_model")
    async def load_model():
        """`transformers chat` calls this first; the model is loaded already."""
        ready = json.dumps({"status": "ready", "cached": True})
        return Response(f"data: {ready}\n\n", media_type="text/event-stream")

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request):
        service.check(body)
        client = Client(request, service.metrics)
        answer = await service.start(body, client.put)
        completion = Completion(f"chatcmpl-{uuid.uuid4().hex}", config.name, processor.tokenizer)
        deltas = client.deltas(answer)
        if body.stream:
            first = await anext(deltas)  # an error before the first delta sets the HTTP status
            return StreamingResponse(
                _events(first, deltas, answer, completion, body),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            )
        parts = [delta async for delta in deltas]
        reason = parts[-1].finish_reason or "stop"
        if reason == "cancelled":
            raise HTTPException(503, _CANCELLED)
        choices = [choice for delta in parts for choice in delta.choices] if body.logprobs else None
        text = "".join(delta.text for delta in parts)
        return completion.whole(text, choices, reason, _usage(answer))

    return app


class Gate:
    """Refuses requests before their body is read: without the key, too large, or of unknown length."""

    def __init__(self, app: ASGIApp, config: ServerConfig):
        self.app = app
        self.config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        if scope["type"] == "http" and (refusal := self._refusal(scope, Headers(scope=scope))):
            await refusal(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> JSONResponse | None:
        end = {"Connection": "close"}  # what the client still sends is not read either
        key, given = self.config.api_key, headers.get("authorization", "").removeprefix("Bearer ")
        if (
            key
            and scope["path"].startswith("/v1")
            and not secrets.compare_digest(given.encode(), key.encode())
        ):
            body = error_body("wrong or missing API key", "authentication_error", "invalid_api_key")
            return JSONResponse(body, 401, end)
        length, most = headers.get("content-length"), self.config.body_bytes
        if scope["method"] == "POST" and (length is None or int(length) > most):
            found = f"the body must say its length, of at most {most:,} bytes; found {length}"
            return JSONResponse(error_body(found, _KINDS[400]), 411 if length is None else 413, end)
        return None


async def _events(
    first: Delta, deltas: AsyncIterator[Delta], answer: Answer, completion: Completion, body: ChatRequest
) -> AsyncIterator[str]:
    """Server-sent events of a streamed answer."""
    yield _event(completion.chunk({"role": "assistant", "content": ""}, []))
    delta: Delta | None = first
    try:
        while delta:
            if delta.text or delta.choices:
                yield _event(completion.chunk({"content": delta.text}, delta.choices))
            if delta.finish_reason == "cancelled":
                yield _event(error_body(_CANCELLED, "server_error", "cancelled"))
                return
            if delta.finish_reason:
                yield _event(completion.chunk({}, [], delta.finish_reason))
            delta = await anext(deltas, None)
    except EngineError:
        yield _event(_ENGINE_ERROR)
        return
    if body.stream_options and body.stream_options.include_usage:
        yield _event(completion.usage_chunk(_usage(answer)))
    yield "data: [DONE]\n\n"


def _event(content: dict) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _usage(answer: Answer) -> dict[str, int]:
    return usage(answer.prompt_tokens, len(answer.tokens))


_CANCELLED = "the answer was cancelled: the server is shutting down"
_ENGINE_ERROR = error_body("the model failed on this request", "server_error", "engine_error")

_KINDS = {
    400: "invalid_request_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def _add_error_handlers(app: FastAPI, metrics: Metrics):
    """Every error in OpenAI's shape."""

    def refuse(status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> JSONResponse:
        metrics.answers.labels("refused").inc()
        return JSONResponse(body, status, headers)

    @app.exception_handler(UserError)
    async def user_error(_: Request, error: UserError):
        return refuse(400, error_body(str(error), _KINDS[400]))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError):
        found = error.errors()[0]
        where = ".".join(str(place) for place in found["loc"] if place != "body")
        return refuse(400, error_body(f"{where or 'body'}: {found['msg']}", _KINDS[400], param=where or None))

    @app.exception_handler(StarletteHTTPException)
    async def http_error(_: Request, error: StarletteHTTPException):
        detail: Any = error.detail if isinstance(error.detail, dict) else {"message": error.detail}
        status = error.status_code
        kind = _KINDS.get(status, "server_error" if status >= 500 else _KINDS[400])
        body = error_body(detail["message"], kind, detail.get("code"), detail.get("param"))
        return refuse(status, body, dict(error.headers or {}))

    @app.exception_handler(QueueFull)
    async def busy(_: Request, error: QueueFull):
        body = error_body("the queue is full; try again later", _KINDS[429], "server_busy")
        return refuse(429, body, {"Retry-After": "1"})

    @app.exception_handler(EngineError)
    async def engine_error(_: Request, error: EngineError):
        return JSONResponse(_ENGINE_ERROR, 500)
