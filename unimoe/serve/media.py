"""Conversion of a request's content parts to message parts with decoded media, within limits.

Nothing is fetched, or read from the disk, unless a flag allows it.
"""

import http.client
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unimoe.errors import UserError, first_line
from unimoe.media.source import Part, decode_base64, is_data_url, media_bytes

from .decode_worker import DecodeRequest
from .decoding import DecodePool
from .protocol import BadRequest, ContentPart, Message


@dataclass(frozen=True)
class MediaLimits:
    """Which media are accepted, and from where."""

    media_bytes: int = 32 << 20
    """Encoded size of one image, video or audio clip."""
    image_pixels: int = 50_000_000
    """Width times height of an image, or of a video's frames."""
    image_side: int = 16_384
    """Longest side, in pixels."""
    audio_seconds: float = 300.0
    """Longest audio."""
    items: int = 32
    """Media in one request."""
    root: Path | None = None
    """``file://`` URLs below this folder may be read; None for none."""
    hosts: list[str] = field(default_factory=list)
    """Hosts from which ``http(s)://`` URLs are fetched, without following redirects."""
    fetch_seconds: float = 10.0
    """Longest time for one download."""
    decode_processes: int = 2
    """Media decoded at once."""
    decode_seconds: float = 20.0
    """Longest time for decoding one of them."""
    decode_bytes: int = 1 << 30
    """Memory of a decoding process."""
    request_seconds: float = 60.0
    """Longest time for preparing all media of a request."""


class MediaReader:
    """Turns messages of a request into the processor's.

    Args:
        preprocessors: of the model, by modality; they say how large images and how many frames are used.
        limits: what is accepted.
    """

    def __init__(self, preprocessors: Mapping[str, Any], limits: MediaLimits) -> None:
        self.preprocessors, self.limits = preprocessors, limits
        self.pool = DecodePool(limits.decode_processes, limits.decode_seconds, limits.decode_bytes)
        self._fetching = ThreadPoolExecutor(
            8, "fetch"
        )  # a slow host keeps one of these, not the server's threads

    def close(self) -> None:
        """End the decoding processes."""
        self.pool.close()
        self._fetching.shutdown(wait=False, cancel_futures=True)

    def read(self, messages: list[Message]) -> list[dict[str, Any]]:
        """Messages with decoded media.

        Raises:
            BadRequest: a part cannot be read or decoded, or exceeds a limit.
        """
        lists = [message.content for message in messages if not isinstance(message.content, str)]
        items = sum(part.type != "text" for parts in lists for part in parts)
        if items > self.limits.items:
            raise BadRequest("messages", f"found {items} media, at most {self.limits.items} are accepted")
        until = time.monotonic() + self.limits.request_seconds
        return [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": message.content
                if isinstance(message.content, str)
                else [
                    self._part(part, f"messages[{index}].content[{place}]", until)
                    for place, part in enumerate(message.content)
                ],
            }
            for index, message in enumerate(messages)
        ]

    def _part(self, part: ContentPart, where: str, until: float) -> Part:
        if part.type == "text":
            return {"type": "text", "text": part.text}
        if time.monotonic() > until:
            seconds = self.limits.request_seconds
            raise BadRequest(where, f"the media of this request take more than {seconds:g} s to prepare")
        try:
            if part.type == "image_url":
                return self._decoded("image", self._content(part.image_url.url, "image", where), where)
            if part.type == "video_url":
                self._modality(("video",), where)
                return self._decoded("video", self._content(part.video_url.url, "video", where), where)
            if part.type == "input_audio":
                modality = self._modality(("speech", "audio"), where)
                return self._decoded(modality, self._audio_content(part.input_audio.data, where), where)
            modality = self._modality(("audio", "speech"), where)
            return self._decoded(modality, self._content(part.audio_url.url, modality, where), where)
        except UserError as error:
            raise BadRequest(where, str(error).removeprefix(f"{where}: ")) from error

    def _modality(self, modalities: tuple[str, ...], where: str) -> str:
        """The first of ``modalities`` that the model takes."""
        for modality in modalities:
            if modality in self.preprocessors:
                return modality
        takes = ", ".join(["text", *self.preprocessors])
        raise UserError(f"{where}: this model takes no {modalities[0]}; it takes {takes}")

    def _decoded(self, modality: str, content: bytes, where: str) -> Part:
        if len(content) > self.limits.media_bytes:
            raise UserError(f"{where}: the {modality} has more than {self.limits.media_bytes:,} bytes")
        if not content:
            raise UserError(f"{where}: the {modality} is empty (0 bytes)")
        preprocessor = self.preprocessors[self._modality((modality,), where)]
        request = DecodeRequest(
            modality,
            where,
            self.limits.image_pixels,
            self.limits.image_side,
            self.limits.audio_seconds,
            longest=preprocessor.longest if modality in ("image", "video") else None,
            frames=getattr(preprocessor, "frames", 0),
            rate=getattr(preprocessor, "rate", None) if modality == "video" else None,
        )
        return self.pool.decode(request, content)

    def _audio_content(self, data: str, where: str) -> bytes:
        if is_data_url(data):  # some clients send one here too
            return self._content(data, "audio", where)
        try:
            return decode_base64(data)
        except ValueError as error:
            raise UserError(f"{where}: the data are not valid base64: {error}") from error

    def _content(self, url: str, modality: str, where: str) -> bytes:
        """The encoded media behind a URL."""
        self._modality((modality,), where)
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            return media_bytes({"type": modality, "url": url}, where)
        try:
            if scheme == "file":
                return self._from_disk(url, where)
            if scheme in ("http", "https"):
                return self._fetch(url, where)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{where}: {url[:60]!r} is not a valid URL: {first_line(error)}") from error
        raise UserError(f"{where}: found a URL that starts with {url[:20]!r}, expected a data URL")

    def _from_disk(self, url: str, where: str) -> bytes:
        refused = UserError(f"{where}: this server does not read that file; expected a data URL")
        parts = urllib.parse.urlsplit(url)
        if self.limits.root is None or parts.netloc not in ("", "localhost"):
            raise refused
        root = self.limits.root.resolve()
        try:
            path = Path(urllib.parse.unquote(parts.path, errors="strict")).resolve()  # follows links and ..
            if not path.is_relative_to(root) or not path.is_file():
                raise refused
            with open(path, "rb") as file:
                return file.read(self.limits.media_bytes + 1)
        except (OSError, ValueError) as error:  # a NUL byte is a ValueError
            raise refused from error

    def _fetch(self, url: str, where: str) -> bytes:
        parts = urllib.parse.urlsplit(url)
        if parts.hostname not in self.limits.hosts:
            raise UserError(f"{where}: this server does not fetch from that host; expected a data URL")
        # blanks and umlauts, as browsers send them; what is encoded already stays
        url = parts._replace(path=urllib.parse.quote(parts.path, safe="/%:@!$&'()*+,;=~-._")).geturl()
        seconds = self.limits.fetch_seconds
        download = self._fetching.submit(_download, url, self.limits.media_bytes + 1, seconds)
        try:
            return download.result(seconds)
        except TimeoutError as error:
            download.cancel()
            raise UserError(f"{where}: the URL cannot be fetched within {seconds:g} s") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise UserError(f"{where}: the URL cannot be fetched: {first_line(error)}") from error


def _download(url: str, most: int, seconds: float) -> bytes:
    with _OPENER.open(url, timeout=seconds) as reply:
        return reply.read(most)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """An allowed host must not lead to one that is not."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)
