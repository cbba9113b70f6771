"""HTTP: routes, errors, streaming, and clients that disconnect."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware

from unimoe.compress.decoding import Decoding
from unimoe.errors import UserError
from unimoe.inference.engines import AnsweringModel
from unimoe.model.processing import UniMoeProcessor

from .answer import Answer, Delta
from .engine import Engine, EngineConfig, QueueFull
from .gate import Gate
from .media import MediaLimits, MediaReader
from .metrics import Metrics
from .protocol import BadRequest, ChatRequest, Completion, error_body, usage

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
    body_seconds: float = 120.0
    """Longest time for receiving it."""
    cors_origins: list[str] = field(default_factory=list)
    """Origins of web pages that may use the server from a browser; ``*`` for all."""
    max_prompt_tokens: int | None = None
    """Longest prompt, media tokens included; None for the LLM's context length."""
    max_new_tokens: int = 1024
    """Longest answer, and the default of requests that set no maximum."""
    decoding: Decoding = field(default_factory=Decoding)
    """How experts take part in answers whose requests do not say it."""
    media: MediaLimits = field(default_factory=MediaLimits)
    engine: EngineConfig = field(default_factory=EngineConfig)


class EngineError(Exception):
    """The model failed on this request."""


class Service:
    """Model, engine and limits behind the routes."""

    def __init__(self, model: AnsweringModel, processor: UniMoeProcessor, config: ServerConfig):
        self.model = model
        self.processor = processor
        self.config = config
        self.media = MediaReader(processor.preprocessors, config.media)
        self.engine = Engine(model, config.engine)
        self.metrics = Metrics(self.engine)
        self.context: int = (
            getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 20
        )

    def check(self, request: ChatRequest):
        """Validate a request before anything is computed.

        Raises:
            HTTPException: 404 for another model's name.
            UserError: a field this server does not support.
        """
        self.check_name(request.model)
        request.check()

    def check_name(self, name: str | None) -> None:
        """Raises HTTPException 404 for the name of another model."""
        if name not in (None, self.config.name):
            found = f"the model {str(name)[:100]!r} is not served here, only {self.config.name!r}"
            raise HTTPException(404, {"message": found, "code": "model_not_found", "param": "model"})

    def close(self) -> None:
        """End the engine and the decoding processes."""
        self.engine.close()
        self.media.close()

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
        try:
            encoded = self.processor.encode(messages, add_generation_prompt=True, where="messages")
        except UserError as error:  # such as the chat template's refusal of a turn
            raise BadRequest("messages", str(error).removeprefix("messages: ")) from error
        length = len(encoded["input_ids"])
        self._check_length(length, most)
        defaults = self.model.generation_config
        sampling = request.sampling(defaults, self.config.max_new_tokens, self.context - length)
        decoding = request.decoding(self.config.decoding, self.model)
        inputs = self.processor.pad([encoded], "left")
        return Answer(self.model, self.processor.tokenizer, inputs, sampling, on_delta, decoding)

    def _check_length(self, tokens: int, most: int):
        if tokens > most:
            found = f"the prompt has {tokens} tokens or more; at most {most} are accepted"
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


def build_app(model: AnsweringModel, processor: UniMoeProcessor, config: ServerConfig) -> FastAPI:
    """The application. The end of its lifespan closes the engine and the decoding processes."""
    service = Service(model, processor, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        yield
        await run_in_threadpool(service.close)

    app = FastAPI(title="unimoe", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(
        Gate,
        api_key=config.api_key,
        trusted_hosts=config.trusted_hosts,
        body_bytes=config.body_bytes,
        body_seconds=config.body_seconds,
    )
    if config.cors_origins:  # outermost: a browser must be able to read refusals too
        app.add_middleware(
            CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    _add_error_handlers(app, service.metrics)
    card = {"id": config.name, "object": "model", "created": int(time.time()), "owned_by": "unimoe"}

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health():
        if not service.engine.alive:
            raise HTTPException(503, "the engine has stopped")
        return {"status": "ok", "model": config.name}

    @app.get("/metrics")
    async def metrics():
        return Response(service.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model_card(name: str):
        service.check_name(name)
        return card

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
        return completion.complete(text, choices, reason, _usage(answer))

    return app


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
        param = error.param if isinstance(error, BadRequest) else None
        return refuse(400, error_body(str(error), _KINDS[400], param=param))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError):
        message, param = _describe(error.errors()[0], request.headers.get("content-type"))
        return refuse(400, error_body(message, _KINDS[400], param=param))

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

    @app.exception_handler(Exception)  # its traceback is logged by the server
    async def internal_error(_: Request, error: Exception):
        return JSONResponse(error_body("internal error; see the server's log", "server_error"), 500)


def _describe(found: Mapping[str, Any], content_type: str | None) -> tuple[str, str | None]:
    """Message and field of a validation error of pydantic."""
    if found["type"] == "json_invalid":
        reason = found.get("ctx", {}).get("error", found["msg"])
        return f"the body is not JSON: {reason} at character {found['loc'][-1]}", None
    places = [place for place in found["loc"][1:] if not str(place).startswith("<")]
    param = "".join(f"[{place}]" if isinstance(place, int) else f".{place}" for place in places)[1:]
    if not param:
        kind = (content_type or "").partition(";")[0].strip().lower()
        if kind != "application/json":
            return f"the Content-Type is {content_type!r}, expected application/json", None
        return f"the body must be a JSON object: {found['msg']}", None
    shown = ""
    if isinstance(found.get("input"), (str, int, float, type(None))):
        shown = f", found {str(found['input'])[:60]!r}" if found["input"] is not None else ", found null"
    return f"{param}: {found['msg']}{shown}", param
