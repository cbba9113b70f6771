"""From content parts to what the processor takes, within limits.

Nothing is fetched, or read from the disk, unless a flag allows it.
"""

import io
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from unimoe.errors import UserError
from unimoe.media.audio import load_audio
from unimoe.media.source import media_bytes

from .protocol import ContentPart, Message

IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Pillow's other readers are many, old, and one of them runs Ghostscript."""

VIDEO_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,ogg,mpeg,mpegts,gif"
"""FFmpeg's other readers include playlists, which name further addresses and files."""


@dataclass(frozen=True)
class MediaLimits:
    """What may come, and from where."""

    media_bytes: int = 32 << 20
    """Encoded size of one picture, sound or video."""
    image_pixels: int = 50_000_000
    """Width times height of a picture, or of a video's frames."""
    image_side: int = 16_384
    """Longest side, in pixels."""
    audio_seconds: float = 300.0
    """Length of a sound."""
    items: int = 32
    """Media in one request."""
    root: Path | None = None
    """``file://`` addresses below this folder may be read; None for none."""
    hosts: list[str] = field(default_factory=list)
    """Hosts from which ``http(s)://`` addresses are fetched, without following redirects."""
    fetch_seconds: float = 10.0
    """Longest wait for such a host."""


class MediaReader:
    """Turns messages of a request into the processor's, for a model that takes ``modalities``."""

    def __init__(self, modalities: list[str], limits: MediaLimits):
        self.modalities = modalities
        self.limits = limits

    def read(self, messages: list[Message]) -> list[dict[str, Any]]:
        """Messages with media that were looked at. Raises UserError that names the part."""
        lists = [message.content for message in messages if not isinstance(message.content, str)]
        items = sum(part.type != "text" for parts in lists for part in parts)
        if items > self.limits.items:
            raise UserError(f"messages hold {items} media; this server takes at most {self.limits.items}")
        return [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": message.content
                if isinstance(message.content, str)
                else [
                    self._part(part, f"messages[{index}].content[{place}]")
                    for place, part in enumerate(message.content)
                ],
            }
            for index, message in enumerate(messages)
        ]

    def _part(self, part: ContentPart, where: str) -> dict[str, Any]:
        if part.type == "text":
            return {"type": "text", "text": part.text}
        if part.type == "image_url":
            kind = self._kind(("image",), where)
            return self._image(self._content(part.image_url.url, kind, where), where)
        if part.type == "video_url":
            kind = self._kind(("video",), where)
            return self._video(self._content(part.video_url.url, kind, where), where)
        if part.type == "input_audio":  # somebody speaks
            kind = self._kind(("speech", "audio"), where)
            return self._sound(
                self._content(f"data:;base64,{part.input_audio.data}", kind, where), kind, where
            )
        kind = self._kind(("audio", "speech"), where)
        return self._sound(self._content(part.audio_url.url, kind, where), kind, where)

    def _kind(self, kinds: tuple[str, ...], where: str) -> str:
        """The first of ``kinds`` that the model takes."""
        for kind in kinds:
            if kind in self.modalities:
                return kind
        takes = ", ".join(["text", *self.modalities])
        raise UserError(f"{where}: this model takes no {kinds[0]}; it takes {takes}")

    def _image(self, content: bytes, where: str) -> dict[str, Any]:
        expected = f"expected one of the formats {', '.join(IMAGE_FORMATS)}"
        try:
            with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as picture:
                width, height = picture.size  # from the header: nothing is decoded yet
        except Image.DecompressionBombError as error:  # Pillow's own limit, before ours is looked at
            raise UserError(f"{where}: the image has too many pixels; {self._most_pixels()}") from error
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{where}: the image cannot be read; {expected}") from error
        self._check_size("image", width, height, where)
        return {"type": "image", "bytes": content}

    def _video(self, content: bytes, where: str) -> dict[str, Any]:
        try:
            import av
            from av.error import FFmpegError
        except ImportError as error:
            raise UserError(
                f"{where}: videos need PyAV on the server: pip install 'unimoe[video]'"
            ) from error
        options = {"format_whitelist": VIDEO_FORMATS, "protocol_whitelist": "none"}
        try:
            with av.open(io.BytesIO(content), options=options) as container:
                sizes = [(stream.width, stream.height) for stream in container.streams.video]
        except (FFmpegError, ValueError) as error:
            raise UserError(f"{where}: the video cannot be read; expected mp4, webm or avi") from error
        for width, height in sizes:
            self._check_size("video", width, height, where)
        return {"type": "video", "bytes": content}

    def _check_size(self, kind: str, width: int, height: int, where: str):
        if width * height > self.limits.image_pixels or max(width, height) > self.limits.image_side:
            raise UserError(f"{where}: the {kind} has {width} x {height} pixels; {self._most_pixels()}")

    def _most_pixels(self) -> str:
        return f"at most {self.limits.image_pixels:,} are taken, and {self.limits.image_side:,} on a side"

    def _sound(self, content: bytes, kind: str, where: str) -> dict[str, Any]:
        rate, most = 16_000, self.limits.audio_seconds
        samples = load_audio({"type": kind, "bytes": content}, where, rate, longest=most + 1)
        if len(samples) > most * rate:
            raise UserError(f"{where}: the sound is longer than the {most:g} seconds that are taken")
        return {"type": kind, kind: samples}

    def _content(self, url: str, kind: str, where: str) -> bytes:
        """The encoded medium behind an address."""
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            content = media_bytes({"type": kind, "url": url}, where)
        elif scheme == "file":
            content = self._from_disk(url, where)
        elif scheme in ("http", "https"):
            content = self._fetch(url, where)
        else:
            raise UserError(f"{where}: found an address that begins with {url[:20]!r}, expected a data URL")
        if len(content) > self.limits.media_bytes:
            raise UserError(f"{where}: the {kind} has more than {self.limits.media_bytes:,} bytes")
        return content

    def _from_disk(self, url: str, where: str) -> bytes:
        refused = UserError(f"{where}: this server does not read that file; expected a data URL")
        parts = urllib.parse.urlsplit(url)
        if self.limits.root is None or parts.netloc not in ("", "localhost"):
            raise refused
        root = self.limits.root.resolve()
        try:
            path = Path(urllib.parse.unquote(parts.path, errors="strict")).resolve()  # links and .. followed
            if not path.is_relative_to(root) or not path.is_file():
                raise refused
            with open(path, "rb") as file:
                return file.read(self.limits.media_bytes + 1)
        except (OSError, ValueError) as error:  # a NUL byte is a ValueError
            raise refused from error

    def _fetch(self, url: str, where: str) -> bytes:
        if urllib.parse.urlsplit(url).hostname not in self.limits.hosts:
            raise UserError(f"{where}: this server does not fetch from that address; expected a data URL")
        try:
            with _OPENER.open(url, timeout=self.limits.fetch_seconds) as reply:
                return reply.read(self.limits.media_bytes + 1)
        except (OSError, ValueError) as error:
            raise UserError(f"{where}: the address cannot be fetched: {error}") from error


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A host that is allowed must not lead to one that is not."""

    def redirect_request(self, *args, **kwargs):
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)
