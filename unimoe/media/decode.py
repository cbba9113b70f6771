"""Decoding pictures and sound; moving pictures are in video.py.

What is wrong with a file becomes a UserError that begins with ``where``.
"""

import base64
import binascii
import io
import logging
import urllib.parse
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import soundfile
import soxr
from PIL import Image, ImageOps, UnidentifiedImageError

from unimoe.errors import UserError, first_line

from .part import Part

logger = logging.getLogger(__name__)

_BLOCK = 1 << 16  # sound frames decoded at a time
_RATES = (100, 1_000_000)  # Hz; what resampling can do


def load_image(part: Part, where: str, longest: int | None = None) -> Image.Image:
    """Decode an image part to RGB, upright (EXIF orientation applied), transparency laid on white.

    ``part`` holds ``path``, ``bytes``, a data URL ``url``, or an opened ``image`` or array [H, W, 3] uint8.
    Of an animation or of pages the first is taken, with a warning; grey of 16 bits or floats is scaled to 8
    bits. A picture with a side of more than ``longest`` pixels is scaled down to that, a JPEG while it is
    decoded. Raises UserError when it cannot be read or decoded, or has more pixels than Pillow deems safe
    (179 million).
    """
    try:
        picture = part.get("image")
        if picture is None:
            with open_media(part, where) as file:
                picture = Image.open(file)
                if more := _more_pictures(picture):
                    logger.warning("%s: the image %s %s", where, describe(part), more)
                if longest:  # of a JPEG only every 2nd, 4th or 8th pixel has to be decoded
                    picture.draft(picture.mode, (longest, longest))
                picture.load()
        elif isinstance(picture, np.ndarray):
            picture = Image.fromarray(picture)
        picture = ImageOps.exif_transpose(picture)
        if longest and max(picture.size) > longest:
            if picture.mode not in ("L", "RGB", "RGBA", "CMYK"):
                picture = _rgb(picture)  # of a palette's indices there is no mean
            picture.thumbnail((longest, longest), reducing_gap=2.0)
        return _rgb(picture)
    except UserError:
        raise
    except Exception as error:  # on broken files Pillow raises nearly anything, also SyntaxError
        known = not isinstance(error, UnidentifiedImageError)  # whose message names our buffer
        reason = first_line(error) if known else "no format that Pillow knows"
        raise UserError(f"{where}: cannot decode the image {describe(part)}: {reason}") from error


def load_audio(part: Part, where: str, rate: int = 16000, longest: float | None = None) -> np.ndarray:
    """Decode a speech or audio part to mono float32 [samples] at ``rate`` Hz; channels are averaged.

    What comes after ``longest`` seconds is left out, with a warning, and not decoded.

    ``part`` holds ``path``, ``bytes``, a data URL ``url``, or an already decoded array under its own type
    (``[samples]`` or ``[samples, channels]``, in Hz by ``sampling_rate``, else taken as ``rate``). Files
    are what libsndfile reads: wav, flac, ogg, mp3, aiff, ... Raises UserError for a sound that is unreadable,
    empty or not finite.
    """
    array = part.get(part["type"])
    if array is not None:
        samples, found_rate = np.asarray(array), part.get("sampling_rate", rate)
        if samples.ndim not in (1, 2) or (samples.ndim == 2 and samples.shape[0] < samples.shape[1]):
            found = f"{where}: a sound has the shape {list(samples.shape)}"
            raise UserError(f"{found}, expected [samples] or [samples, channels]")
        if samples.dtype == np.uint8:  # as in a wav file: 128 is silence
            samples = (samples - 128.0) / 128
        if np.issubdtype(samples.dtype, np.signedinteger):
            samples = samples / -float(np.iinfo(samples.dtype).min)
        whole = len(samples) / max(found_rate, 1)
        samples = samples[: _most(longest, found_rate)]
    else:
        blocks, count = [], 0
        for block, found_rate, announced in _sound_blocks(part, where):
            blocks.append(block)
            count += len(block)
            whole = count / found_rate
            if longest is not None and whole >= longest:
                whole = announced
                break
        samples = np.concatenate(blocks)[: _most(longest, found_rate)]
    _check_sound(samples, found_rate, part, where)
    if longest and whole > longest:
        found = f"{where}: the sound {describe(part)} lasts {whole:.0f} s"
        logger.warning("%s; what comes after %.0f s is left out (max_windows)", found, longest)
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    if found_rate != rate:
        resampled = soxr.resample(samples, found_rate, rate)
        samples = resampled if resampled.size else samples[:1]  # a few samples at a high rate
    return np.ascontiguousarray(samples, dtype=np.float32)


def check_audio(part: Part, where: str) -> None:
    """Decode a sound to its end, and keep none of it. Raises UserError as :func:`load_audio` does."""
    for block, rate, _ in _sound_blocks(part, where):
        _check_sound(block, rate, part, where)


def open_media(part: Part, where: str) -> BinaryIO:
    """The encoded file behind a part, from its ``path``, ``bytes``, data URL or place in a larger file.

    Raises UserError if it is empty."""
    try:
        if "path" in part:
            file: BinaryIO = open(part["path"], "rb")  # noqa: SIM115  (the caller closes it)
        elif "url" in part:
            file = io.BytesIO(_data_url_bytes(part["url"], where))
        elif "bytes" in part:
            file = io.BytesIO(part["bytes"])
        elif "stored" in part:
            file = io.BytesIO(part["stored"].read())
        else:
            expected = "expected path, bytes or a data URL"
            raise UserError(f"{where}: the {part['type']} part has no medium; {expected}")
        empty = not file.read(1)
        file.seek(0)
    except OSError as error:
        raise UserError(f"{where}: cannot read {describe(part)}: {error.strerror}") from error
    if empty:
        file.close()
        raise UserError(f"{where}: the {part['type']} {describe(part)} is empty (0 bytes)")
    return file


def media_bytes(part: Part, where: str) -> bytes:
    """All of the encoded file behind a part; of a list of frames, one after another."""
    if frames := frame_parts(part):
        return b"".join(media_bytes(frame, where) for frame in frames)
    with open_media(part, where) as file:
        return file.read()


def frame_parts(part: Part) -> list[Part] | None:
    """The pictures of a video that is a list of frames, as image parts; None of any other medium."""
    for key in ("path", "bytes", "stored", "url"):
        if isinstance(part.get(key), list):
            return [{"type": "image", key: frame} for frame in part[key]]
    return None


def describe(part: Part) -> str:
    """What to call a medium in a message to the user: its path, else what it was given as."""
    if frames := frame_parts(part):
        return f"of {len(frames)} frames ({describe(frames[0])}, ...)"
    if "path" in part:
        return str(part["path"])
    if "stored" in part:
        return str(part["stored"])
    if "url" in part:
        return "given as a data URL"
    return "given as bytes" if "bytes" in part else "given in memory"


def _sound_blocks(part: Part, where: str) -> Iterator[tuple[np.ndarray, int, float]]:
    """Mono samples of a sound's file, block by block, only the first perhaps empty; with each the file's rate
    and the seconds it announces: what a broken header claims is never allocated."""
    try:
        with open_media(part, where) as encoded, soundfile.SoundFile(encoded) as file:
            block, seconds = file.read(_BLOCK, dtype="float32", always_2d=True), file.frames / file.samplerate
            yield block.mean(axis=1), file.samplerate, seconds
            while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
                yield block.mean(axis=1), file.samplerate, seconds
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:  # soundfile's own error is a RuntimeError
        reason = first_line(error).rpartition(">: ")[2]  # without our buffer's name
        message = f"{where}: cannot decode the sound {describe(part)}: {reason}"
        raise UserError(f"{message}; expected wav, flac, ogg or mp3") from error


def _check_sound(samples: np.ndarray, rate: float, part: Part, where: str) -> None:
    found = f"{where}: the sound {describe(part)}"
    if not _RATES[0] <= rate <= _RATES[1]:
        raise UserError(f"{found} has {rate} samples a second, expected {_RATES[0]} to {_RATES[1]:,}")
    if not samples.size:
        raise UserError(f"{found} holds no samples")
    if not np.isfinite(samples).all():
        raise UserError(f"{found} holds values that are not finite numbers")


def _most(longest: float | None, rate: float) -> int | None:
    """The samples in ``longest`` seconds."""
    return None if longest is None else round(longest * rate)


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


def _more_pictures(picture: Image.Image) -> str | None:
    """What to say of a file that holds more pictures than the one that is taken."""
    if not getattr(picture, "is_animated", False) or picture.format == "MPO":
        return None  # an MPO is a phone's JPEG, with a preview or a depth map behind it
    if picture.format == "TIFF":
        return f"holds {picture.n_frames} pages; its first is taken"
    return "is an animation; its first frame is taken (as a video its time would count)"


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # Pillow would clip 16-bit grey at 255
        grey = np.asarray(picture).astype(np.int64)
        picture = Image.fromarray((grey // 256 if grey.max() > 255 else grey).clip(0, 255).astype(np.uint8))
    elif picture.mode == "F":  # 0 to 1, or what else its numbers go up to
        grey = np.nan_to_num(np.asarray(picture))
        picture = Image.fromarray((255 * grey / max(1.0, float(grey.max()))).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")
