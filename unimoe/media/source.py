"""Sources of encoded media: files, bytes, data URLs, members of larger files; and what they contain.

What is wrong becomes a UserError that starts with ``where``, the place of the media part.
"""

import base64
import binascii
import io
import re
import urllib.parse
from typing import Any, BinaryIO, Protocol

from unimoe.errors import UserError

Part = dict[str, Any]
"""``{"type": "text", "text": str}`` or ``{"type": modality, ...}`` with the media under one of ``path``
(absolute), ``bytes`` (an encoded file), ``stored`` (the same inside a larger file: a :class:`Stored`) or
``url`` (a data URL); for a video also a list of these, its frames."""


class Stored(Protocol):
    """What a media part holds under ``stored``; ``str()`` of it names the place."""

    def read(self) -> bytes:
        """The encoded file. Raises OSError when it cannot be read."""
        ...


def open_media(part: Part, where: str) -> BinaryIO:
    """The encoded file behind a part, from its ``path``, ``bytes``, data URL or place in a larger file.

    Raises:
        UserError: it cannot be read, or is empty.
    """
    try:
        if "path" in part:
            file: BinaryIO = open(part["path"], "rb")  # noqa: SIM115  (the caller closes it)
        elif "url" in part:
            file = io.BytesIO(data_url_bytes(part["url"], where))
        elif "bytes" in part:
            file = io.BytesIO(part["bytes"])
        elif "stored" in part:
            file = io.BytesIO(part["stored"].read())
        else:
            expected = "expected path, bytes or a data URL"
            raise UserError(f"{where}: the {part['type']} part has no content; {expected}")
        empty = not file.read(1)
        file.seek(0)
    except (OSError, ValueError) as error:  # a NUL byte in a path is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{where}: cannot read {describe(part)}: {reason}") from error
    if empty:
        file.close()
        raise UserError(f"{where}: the {part['type']} {describe(part)} is empty (0 bytes)")
    return file


def media_bytes(part: Part, where: str) -> bytes:
    """The encoded file behind a part; the files of a list of frames, concatenated.

    Raises:
        UserError: it cannot be read, or is empty.
    """
    if frames := frame_parts(part):
        return b"".join(media_bytes(frame, where) for frame in frames)
    with open_media(part, where) as file:
        return file.read()


def frame_parts(part: Part) -> list[Part] | None:
    """The frames of a video that is a list of images, as image parts; None for anything else."""
    for key in ("path", "bytes", "stored", "url"):
        if isinstance(part.get(key), list):
            return [{"type": "image", key: frame} for frame in part[key]]
    return None


def describe(part: Part) -> str:
    """How messages to the user name the media: by path, else by how they were given."""
    if frames := frame_parts(part):
        return f"of {len(frames)} frames ({describe(frames[0])}, ...)"
    if "path" in part:
        return str(part["path"])
    if "stored" in part:
        return str(part["stored"])
    if "url" in part:
        return "given as a data URL"
    return "given as bytes" if "bytes" in part else "given in memory"


def is_data_url(value: str) -> bool:
    """Whether ``value`` begins as a data URL does; schemes are case-insensitive."""
    return value[:5].lower() == "data:"


def data_url_bytes(url: str, where: str) -> bytes:
    """The content of a data URL.

    Raises:
        UserError: it is not a data URL, or its base64 is invalid.
    """
    header, comma, data = url.partition(",")
    if not is_data_url(header) or not comma:
        raise UserError(f"{where}: {url[:60]!r} is not a data URL; remote URLs are not downloaded")
    if header.rpartition(";")[2].strip().lower() != "base64":
        return urllib.parse.unquote_to_bytes(data)
    try:
        return decode_base64(data)
    except ValueError as error:
        raise UserError(f"{where}: the data URL {url[:30]!r}... is not valid base64: {error}") from error


def decode_base64(text: str) -> bytes:
    """Base64 as it occurs: standard or URL-safe, percent-encoded, with line breaks, with or without padding.

    Raises:
        ValueError: it contains other characters, or ends in the middle of a byte.
    """
    if "%" in text:
        text = urllib.parse.unquote(text)
    text = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(str(error).splitlines()[0]) from error


_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]{32,}={0,2}\s*")


def bare_base64(text: str) -> bytes | None:
    """The content of base64 that is not in a data URL, if it is that of a media file; else None."""
    if len(text) < 32 or not _BASE64.fullmatch(text, 0, 1024) and not _BASE64.fullmatch(text):
        return None
    try:
        return decode_base64(text) if media_format(decode_base64(text[:64])) else None
    except ValueError:
        return None


_SIGNATURES = [
    ("image", rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|BM|II[*+]\0|MM\0[*+]|P[1-6]\s|8BPS"),
    ("image", rb"RIFF....WEBP|\0\0\0\x0cjP  |\xffO\xffQ"),
    ("image", rb"....ftyp(avif|avis|heic|heix|heim|heis|mif1|msf1)"),
    ("audio", rb"(RIFF|RF64)....WAVE|FORM....AIF[FC]|fLaC|ID3|\xff[\xe2-\xe7\xf0-\xff]|#!AMR|\.snd|caff"),
    ("audio", rb"....ftypM4[AB] |OggS.{24}(\x01vorbis|OpusHead|\x7fFLAC|Speex)"),
    ("video", rb"....(ftyp|moov|mdat|wide)|\x1aE\xdf\xa3|RIFF....AVI |FLV\x01|0&\xb2u\x8ef\xcf\x11"),
    ("video", rb"\0\0\x01[\xb3\xba]|G.{187}G|OggS|\.RMF"),
]
_COMPILED = [(modality, re.compile(pattern, re.DOTALL)) for modality, pattern in _SIGNATURES]


def media_format(head: bytes) -> str | None:
    """``image``, ``audio`` or ``video`` by the first bytes of a file; None for anything else.

    Video containers (MP4, Matroska, MPEG-TS, ...) count as video although they may hold audio alone:
    :func:`unimoe.media.container.modality` opens them.
    """
    return next((modality for modality, pattern in _COMPILED if pattern.match(head)), None)
