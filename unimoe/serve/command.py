"""``unimoe serve``: an OpenAI-compatible server for one model."""

import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from unimoe.compress.decoding import Decoding
from unimoe.errors import UserError
from unimoe.inference.engines import Engine, GGUFType, check_decoding, load_engine

if TYPE_CHECKING:
    from torch.nn import Module

logger = logging.getLogger(__name__)

LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    api_key: str | None = None,
    engine: Engine = "torch",
    type: GGUFType | None = None,
    gguf: Path | None = None,
    device: str | None = None,
    max_batch: int = 8,
    max_queue: int = 32,
    max_prompt_tokens: int | None = None,
    max_new_tokens: int = 1024,
    contrast: float = 0.0,
    rewire: int = 0,
    experts: int = 0,
    skip: str = "",
    max_body_mb: int = 48,
    max_image_megapixels: float = 50.0,
    max_audio_seconds: float = 300.0,
    media_root: Path | None = None,
    media_hosts: list[str] | None = None,
    cors_origins: list[str] | None = None,
    drain_seconds: int = 60,
) -> None:
    """Serve a model to any OpenAI client: /v1/chat/completions, /v1/models, /health, /metrics.

    Requests are batched continuously, up to --max-batch at a time. Media come as data URLs; other URLs and
    files only where --media-hosts or --media-root allow them. SIGTERM and Ctrl-C let running answers finish.

    Args:
        model: folder of a finished stage (or a hub id of a unimoe model).
        host: address to listen on; 0.0.0.0 for all interfaces, then with an API key.
        port: to listen on; 0 picks a free one.
        name: the model's name for clients (default: the folder's name).
        api_key: what clients must send; better in the environment, as UNIMOE_API_KEY.
        engine: torch; or llama.cpp, which decodes faster and in less memory and cannot be looked into.
        type: weights of llama.cpp: q8_0, f16 or f32 (default: q8_0).
        gguf: file of `unimoe export gguf` for llama.cpp (default: made on first use, in the cache).
        device: such as cpu or cuda (default: a GPU if available).
        max_batch: answers decoded together.
        max_queue: answers that wait for a slot; further requests receive 429.
        max_prompt_tokens: longest prompt, media tokens included (default: the LLM's context).
        max_new_tokens: longest answer, and the default length.
        contrast: default of requests: strength of the contrast with the model's own worse experts (SCMoE).
        rewire: default of requests: steps that shift the routers towards the prompt; such answers run alone.
        experts: default of requests: experts of a token, fewer than the router chooses.
        skip: default of requests: weights below which experts are skipped, such as image=0.5,text=0.2.
        max_body_mb: largest request, in megabytes.
        max_image_megapixels: largest image.
        max_audio_seconds: longest audio.
        media_root: folder below which file:// URLs may be read.
        media_hosts: hosts from which http(s):// URLs may be fetched.
        cors_origins: origins of web pages that may use the server, such as https://chat.example; * for all.
        drain_seconds: how long running answers may take after the server is told to stop.

    Raises:
        UserError: a flag is out of range, the port is taken, or the model cannot be loaded.
    """
    try:
        import uvicorn

        from .app import ServerConfig, build_app
        from .connections import uvicorn_config
        from .engine import EngineConfig
        from .media import MediaLimits
    except ImportError as error:
        raise UserError(f"serving needs more packages ({error.name}): pip install 'unimoe[serve]'") from error
    if media_root is not None and not media_root.is_dir():
        raise UserError(f"--media-root {media_root}: found no folder there")
    limits = {
        "--max-prompt-tokens": max_prompt_tokens,
        "--max-new-tokens": max_new_tokens,
        "--max-body-mb": max_body_mb,
        "--max-image-megapixels": max_image_megapixels,
        "--max-audio-seconds": max_audio_seconds,
    }
    for flag, limit in limits.items():
        if limit is not None and not 0 < limit < float("inf"):
            raise UserError(f"{flag} must be above 0, found {limit}")
    if drain_seconds < 0:
        raise UserError(f"--drain-seconds must be at least 0, found {drain_seconds}")
    decoding = Decoding.from_flags(contrast, rewire, experts, skip)
    api_key = _key(api_key)
    limits_of_engine = EngineConfig(max_batch=max_batch, max_queue=max_queue)
    _check_port(host, port)
    if host not in LOCAL and not api_key:
        logger.warning("anyone who can reach %s may use this model; --api-key restricts that", host)
    body = max_body_mb << 20
    config = ServerConfig(
        name=name or _folder_name(model),
        api_key=api_key,
        trusted_hosts=list(LOCAL) if host in LOCAL else ["*"],
        body_bytes=body,
        cors_origins=cors_origins or [],
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        decoding=decoding,
        media=MediaLimits(
            media_bytes=body,
            image_pixels=int(max_image_megapixels * 1e6),
            audio_seconds=max_audio_seconds,
            root=media_root,
            hosts=media_hosts or [],
        ),
        engine=limits_of_engine,
    )
    served, processor = load_engine(model, engine, type, gguf, max_batch, device)
    check_decoding(served, decoding)
    own_weights(served)
    app = build_app(served, processor, config)
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn drains, then raises the signal again
        signal.signal(number, lambda *_: sys.exit(0))
    settings = {"timeout_graceful_shutdown": drain_seconds, "log_level": "info"}
    uvicorn.Server(uvicorn_config(app, host=host, port=port, **settings)).run()


def own_weights(model: "Module") -> None:
    """Copy weights on the CPU into memory of their own.

    safetensors maps the file: overwriting it would change a running server's answers, truncating it would
    end the process.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def _key(given: str | None) -> str | None:
    """The API key of the flag or the environment. An empty one is a variable that was not set."""
    key = os.environ.get("UNIMOE_API_KEY") if given is None else given
    if key is not None and not key.strip():
        source = "UNIMOE_API_KEY" if given is None else "--api-key"
        raise UserError(f"{source} is empty; give a key, or leave it out for a server without one")
    return key


def _folder_name(model: str) -> str:
    path = Path(model)
    return path.resolve().name if path.is_dir() else path.name


def _check_port(host: str, port: int) -> None:
    """Raises UserError where the server could not listen: better before the model is loaded than after."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port must be from 0 to 65535, found {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on --host {host} --port {port}: {reason}") from error
