"""Decoding pictures and sound. What is wrong with a file becomes a UserError that begins with ``where``."""

import base64
import binascii
import io
import urllib.parse

import numpy as np
import soundfile
import soxr
from PIL import Image, ImageOps

from unimoe.errors import UserError

from .sample import Part

_BLOCK = 1 << 16  # sound frames decoded at a time


def load_image(part: Part, where: str) -> Image.Image:
    """Decode an image part to RGB, upright (EXIF orientation applied), transparency laid on white.

    ``part`` holds ``path``, ``bytes``, a data URL ``url``, or an already opened ``image``. Of an animation
    the first frame is taken; 16-bit grey is scaled to 8 bits. Raises UserError when it cannot be read or
    decoded.
    """
    try:
        picture = part.get("image")
        if picture is None:
            picture = Image.open(io.BytesIO(media_bytes(part, where)))
        return _rgb(ImageOps.exif_transpose(picture))
    except UserError:
        raise
    except Exception as error:  # on broken files Pillow raises nearly anything, also SyntaxError
        raise UserError(f"{where}: cannot decode the image {describe(part)}: {_first_line(error)}") from error


def load_audio(part: Part, where: str, rate: int = 16000) -> np.ndarray:
    """Decode a speech or audio part to mono float32 [samples] at ``rate`` Hz; channels are averaged.

    ``part`` holds ``path``, ``bytes``, a data URL ``url``, or an already decoded array under its own type
    (``[samples]`` or ``[samples, channels]``, in Hz by ``sampling_rate``, else taken as ``rate``). Files
    are what libsndfile reads: wav, flac, ogg, mp3, aiff, ... Raises UserError for a sound that is unreadable,
    empty or not finite.
    """
    array = part.get(part["type"])
    if array is not None:
        samples, found_rate = np.asarray(array), int(part.get("sampling_rate", rate))
        if np.issubdtype(samples.dtype, np.signedinteger):
            samples = samples / -float(np.iinfo(samples.dtype).min)
    else:
        content = media_bytes(part, where)
        try:
            samples, found_rate = _decode_sound(content)
        except (RuntimeError, ValueError, TypeError) as error:  # soundfile's own error is a RuntimeError
            message = f"{where}: cannot decode the sound {describe(part)}: {_first_line(error)}"
            raise UserError(f"{message}; expected wav, flac, ogg or mp3") from error
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    if found_rate != rate and samples.size:
        samples = soxr.resample(samples, found_rate, rate)
    if not samples.size:
        raise UserError(f"{where}: the sound {describe(part)} holds no samples")
    if not np.isfinite(samples).all():
        raise UserError(f"{where}: the sound {describe(part)} holds values that are not finite numbers")
    return np.ascontiguousarray(samples, dtype=np.float32)


LOADERS = {"image": load_image, "speech": load_audio, "audio": load_audio}
"""How each kind of medium is decoded; what is not here cannot be decoded yet."""


def media_bytes(part: Part, where: str) -> bytes:
    """The encoded file behind a part, from its ``path``, ``bytes`` or data URL. UserError if it is empty."""
    if "path" in part:
        try:
            with open(part["path"], "rb") as file:
                content = file.read()
        except OSError as error:
            raise UserError(f"{where}: cannot read {describe(part)}: {error.strerror}") from error
    elif "url" in part:
        content = _data_url_bytes(part["url"], where)
    elif "bytes" in part:
        content = part["bytes"]
    elif "stored" in part:
        try:
            content = part["stored"].read()
        except OSError as error:
            raise UserError(f"{where}: cannot read {describe(part)}: {error.strerror}") from error
    else:
        raise UserError(f"{where}: the {part['type']} part has no medium; expected path, bytes or a data URL")
    if not content:
        raise UserError(f"{where}: the {part['type']} {describe(part)} is empty (0 bytes)")
    return content


def describe(part: Part) -> str:
    """What to call a medium in a message to the user: its path, else what it was given as."""
    if "path" in part:
        return str(part["path"])
    if "stored" in part:
        return str(part["stored"])
    if "url" in part:
        return "given as a data URL"
    return "given as bytes" if "bytes" in part else "given in memory"


def _decode_sound(content: bytes) -> tuple[np.ndarray, int]:
    """Mono samples and rate, read in blocks: the length that a broken header claims is never allocated."""
    with soundfile.SoundFile(io.BytesIO(content)) as file:
        blocks = [np.zeros(0, dtype=np.float32)]
        while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
            blocks.append(block.mean(axis=1))
        return np.concatenate(blocks), file.samplerate


def _data_url_bytes(url: str, where: str) -> bytes:
    header, comma, data = url.partition(",")
    if not header.startswith("data:") or not comma:
        raise UserError(f"{where}: {url[:60]!r} is not a data URL; remote addresses are not fetched")
    if not header.endswith(";base64"):
        return urllib.parse.unquote_to_bytes(data)
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{where}: the data URL {url[:30]!r}... is not valid base64: {error}") from error


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # Pillow would clip 16-bit grey at 255
        grey = np.asarray(picture).astype(np.int64)
        picture = Image.fromarray((grey // 256 if grey.max() > 255 else grey).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
