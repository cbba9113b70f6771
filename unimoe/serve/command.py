"""``unimoe serve``: an OpenAI-compatible server for one model."""

import logging
import os
import signal
import sys
from pathlib import Path

from unimoe.errors import UserError
from unimoe.model.loading import load_model

logger = logging.getLogger(__name__)

LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    api_key: str | None = None,
    device: str | None = None,
    max_batch: int = 8,
    max_queue: int = 32,
    max_prompt_tokens: int | None = None,
    max_new_tokens: int = 1024,
    max_body_mb: int = 48,
    max_image_megapixels: float = 50.0,
    max_audio_seconds: float = 300.0,
    media_root: Path | None = None,
    media_hosts: list[str] | None = None,
    drain_seconds: int = 60,
) -> None:
    """Serve a model to any OpenAI client: /v1/chat/completions, /v1/models, /health, /metrics.

    Requests are answered together, up to --max-batch at a time. Media come as data URLs; addresses and
    files only where --media-hosts or --media-root allow them. SIGTERM and Ctrl-C let running answers end.

    Args:
        model: folder of a finished stage (or a hub id of a unimoe model).
        host: address to listen at; 0.0.0.0 for all of this machine's, then with an API key.
        port: of that address; 0 takes a free one.
        name: what clients call the model (default: the folder's name).
        api_key: what clients must send; better in the environment, as UNIMOE_API_KEY.
        device: cpu, cuda, ... (default: the GPU if there is one).
        max_batch: answers made together.
        max_queue: answers that wait for that; more are told to come back (429).
        max_prompt_tokens: longest prompt, media counted (default: what the LLM can see).
        max_new_tokens: longest answer, and the length of those that name none.
        max_body_mb: longest request, in megabytes.
        max_image_megapixels: largest picture.
        max_audio_seconds: longest sound.
        media_root: folder below which file:// addresses may be read.
        media_hosts: hosts from which http(s):// addresses may be fetched.
        drain_seconds: how long running answers may take once the server is told to end.
    """
    try:
        import uvicorn

        from .app import ServerConfig, build_app
        from .engine import EngineConfig
        from .media import MediaLimits
    except ImportError as error:
        raise UserError(f"serving needs more packages ({error.name}): pip install 'unimoe[serve]'") from error
    if media_root is not None and not media_root.is_dir():
        raise UserError(f"--media-root {media_root}: found no folder there")
    api_key = api_key or os.environ.get("UNIMOE_API_KEY")
    if host not in LOCAL and not api_key:
        logger.warning("anybody who can reach %s may use this model; --api-key limits that", host)
    body = max_body_mb << 20
    config = ServerConfig(
        name=name or Path(model).name,
        api_key=api_key,
        trusted_hosts=[*LOCAL, "[::1]"] if host in LOCAL else ["*"],
        body_bytes=body,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        media=MediaLimits(
            media_bytes=body,
            image_pixels=int(max_image_megapixels * 1e6),
            audio_seconds=max_audio_seconds,
            root=media_root,
            hosts=media_hosts or [],
        ),
        engine=EngineConfig(max_batch=max_batch, max_queue=max_queue),
    )
    app = build_app(*load_model(model, device=device), config)
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn drains, then raises the signal again
        signal.signal(number, lambda *_: sys.exit(0))
    uvicorn.run(app, host=host, port=port, timeout_graceful_shutdown=drain_seconds, log_level="info")
