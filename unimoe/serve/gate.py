"""What a request must pass before the application reads it: host, key, and the size and time of its body."""

import asyncio
import secrets
import time
import urllib.parse

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .protocol import error_body

MAX_JSON_ITEMS = 1_000_000
"""Brackets, braces and commas of a body: decoded, each may cost a hundred bytes. Base64 holds none."""


_INVALID = "invalid_request_error"


class Gate:
    """Middleware that refuses requests, most of them before their body is read.

    Args:
        app: what is behind the gate.
        api_key: bearer token that ``/v1`` requires; None for open access.
        trusted_hosts: accepted Host headers, ``*`` for all. A request without the header is no browser's, and
            passes.
        body_bytes: largest request body.
        body_seconds: longest time for receiving it.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        trusted_hosts: list[str],
        body_bytes: int,
        body_seconds: float,
    ) -> None:
        self.app, self.api_key, self.trusted_hosts = app, api_key, trusted_hosts
        self.body_bytes, self.body_seconds = body_bytes, body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif refusal := self._refusal(scope, Headers(scope=scope)):
            await refusal(scope, receive, send)
        else:
            await self.app(scope, _Body(receive, self.body_bytes, self.body_seconds).receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> JSONResponse | None:
        host = headers.get("host")
        if host is not None and "*" not in self.trusted_hosts and _name(host) not in self.trusted_hosts:
            return _refuse(400, "the Host header names another host", _INVALID)
        key, given = self.api_key, headers.get("authorization", "").removeprefix("Bearer ")
        if (
            key
            and scope["path"].startswith("/v1")
            and not secrets.compare_digest(given.encode(), key.encode())
        ):
            return _refuse(401, "wrong or missing API key", "authentication_error", "invalid_api_key")
        length = headers.get("content-length")
        if "transfer-encoding" in headers and length is not None:
            return _refuse(
                400, "found Content-Length and Transfer-Encoding, expected one", "invalid_request_error"
            )
        if length is not None and not length.isdecimal():
            return _refuse(400, f"found the Content-Length {length!r}", _INVALID)
        if scope["method"] == "POST" and (length is None or int(length) > self.body_bytes):
            expected = f"the body must have a Content-Length, of at most {self.body_bytes:,}"
            status = 411 if length is None else 413
            return _refuse(status, f"{expected}; found {length}", _INVALID)
        return None


class _Body:
    """Counts what a request's body holds, whatever its header announces, and how long it takes to come."""

    def __init__(self, receive: Receive, most: int, seconds: float) -> None:
        self._receive, self.most = receive, most
        self.until = time.monotonic() + seconds
        self.bytes = self.items = 0
        self.complete = False

    async def receive(self) -> Message:
        if self.complete:  # from now on it is asked whether the client is still there
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self.until - time.monotonic()))
        except TimeoutError:
            raise HTTPException(408, "the body does not arrive in time", {"Connection": "close"}) from None
        if message["type"] == "http.request":
            body = message.get("body", b"")
            self.complete = not message.get("more_body", False)
            self.bytes += len(body)
            self.items += sum(body.count(mark) for mark in (b"{", b"[", b","))
            if self.bytes > self.most:
                found = f"the body has more than {self.most:,} bytes"
                raise HTTPException(413, found, {"Connection": "close"})
            if self.items > MAX_JSON_ITEMS:
                found = f"the body holds more than {MAX_JSON_ITEMS:,} JSON values"
                raise HTTPException(413, found, {"Connection": "close"})
        return message


def _name(host: str) -> str | None:
    """Name of a Host header, without the port."""
    try:
        return urllib.parse.urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _refuse(status: int, message: str, kind: str, code: str | None = None) -> JSONResponse:
    # what the client still sends is not read either
    return JSONResponse(error_body(message, kind, code), status, {"Connection": "close"})
