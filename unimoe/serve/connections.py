"""Connections: deadlines and limits before a request reaches the application.

uvicorn waits for a request's header forever, and accepts connections until no file descriptor is left.
"""

import asyncio
import resource
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:  # uvicorn types its choice as any protocol
    from uvicorn.protocols.http.h11_impl import H11Protocol as AutoHTTPProtocol
else:
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEADER_SECONDS = 10.0
"""Time from the opening of a connection, or its first byte after a response, to the end of a request's
header."""

HEADER_BYTES = 1 << 16
"""Longest header."""


def max_connections() -> int:
    """Half the file descriptors that the process may open; the rest is for files, pipes and the model."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(1024, max(8, soft // 2)) if soft != resource.RLIM_INFINITY else 1024


class DeadlineProtocol(AutoHTTPProtocol):
    """Closes connections that do not finish a header in time, and the oldest of these where there are too
    many."""

    header_seconds = HEADER_SECONDS
    header_bytes = HEADER_BYTES
    most = max_connections()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.opened = self.loop.time()
        self.header_length = 0
        self.header_timer: asyncio.TimerHandle | None = None
        self._wait_for_header()
        if len(self.connections) > self.most:
            others = [other for other in self.connections if isinstance(other, DeadlineProtocol)]
            waiting = [other for other in others if other.header_timer is not None]
            min(waiting, key=lambda other: other.opened).abort()

    def data_received(self, data: bytes) -> None:
        if self._in_header():
            self._wait_for_header()
            self.header_length += len(data)
        super().data_received(data)
        if not self._in_header():
            self._header_done()
        elif self.header_length > self.header_bytes:
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._header_done()
        super().connection_lost(exc)

    def abort(self) -> None:
        """Close at once; nothing is owed to a connection without a request."""
        self._header_done()
        self.transport.abort()

    def _in_header(self) -> bool:
        """Whether no request is being received or answered."""
        return self.cycle is None or self.cycle.response_complete

    def _wait_for_header(self) -> None:
        if self.header_timer is None:
            self.header_timer = self.loop.call_later(self.header_seconds, self.abort)

    def _header_done(self) -> None:
        self.header_length = 0
        if self.header_timer is not None:
            self.header_timer.cancel()
            self.header_timer = None


def uvicorn_config(app: object, **settings: object) -> uvicorn.Config:
    """A uvicorn configuration with these limits."""
    return uvicorn.Config(app, http=DeadlineProtocol, **settings)  # type: ignore[arg-type]
