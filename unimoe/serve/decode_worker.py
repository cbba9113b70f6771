"""A process that decodes media for the server: ``python -m unimoe.serve.decode_worker MEMORY_BYTES``.

It says ``ready``, then reads requests from standard input and writes answers to standard output, each a line
of JSON and the bytes that it announces:

    {"modality": "image", "size": 1234, "where": ..., ...}  the encoded file
    {"items": [{"shape": [h, w, 3], "dtype": "uint8", ...}]}  the arrays, or {"error": "..."}

:mod:`unimoe.serve.decoding` starts it, and kills it where it takes too long.
"""

import io
import json
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from unimoe.errors import UserError, first_line
from unimoe.media.audio import load_audio
from unimoe.media.container import open_container
from unimoe.media.image import count_jpeg_scans, load_image, open_image
from unimoe.media.video import load_video

IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's other readers are many, old, and one of them runs Ghostscript."""

READY = b"ready\n"

SAMPLING_RATE = 16_000
"""Hz of decoded audio."""

MAX_SCANNED_PIXELS = 1_000_000_000
"""Pixels times scans of a JPEG, about 6 s of CPU; cameras and web sites write at most 12 scans."""

Decoded = list[tuple[np.ndarray, float | None]]
"""Images or frames [h, w, 3] uint8, each with its presentation time in seconds if it has one; or audio
[samples] float32."""


@dataclass(frozen=True)
class DecodeRequest:
    """What to decode, how, and within which limits."""

    modality: str
    """``image``, ``video``, ``speech`` or ``audio``."""
    where: str
    """What errors start with."""
    pixels: int
    """Most pixels of an image, or of a video's frames."""
    side: int
    """Longest side, in pixels."""
    seconds: float
    """Longest audio."""
    longest: int | None = None
    """Scale images and frames down to this many pixels on the longer side."""
    frames: int = 8
    """Frames of a video."""
    rate: float | None = None
    """Frames per second of a video."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def decode(request: DecodeRequest, content: bytes) -> Decoded:
    """The decoded media.

    Raises:
        UserError: they cannot be decoded, or exceed a limit.
    """
    return _DECODERS[request.modality](request, content)


def _image(request: DecodeRequest, content: bytes) -> Decoded:
    expected = f"expected one of the formats {', '.join(IMAGE_FORMATS)}"
    try:
        with open_image(io.BytesIO(content), IMAGE_FORMATS) as image:
            width, height = image.size  # from the header: nothing is decoded yet
    except Image.DecompressionBombError as error:  # Pillow's own limit, before ours is checked
        raise UserError(f"{request.where}: the image has too many pixels; {_most_pixels(request)}") from error
    except Exception as error:
        raise UserError(f"{request.where}: the image cannot be read; {expected}") from error
    _check_size("image", width, height, request)
    scans = count_jpeg_scans(content)
    if scans > 1 and scans * width * height > MAX_SCANNED_PIXELS:
        found = f"the image has {scans} scans of {width} x {height} pixels"
        raise UserError(f"{request.where}: {found}; save it again as an ordinary JPEG")
    image = load_image({"type": "image", "bytes": content}, request.where, request.longest)
    return [(np.asarray(image), None)]


def _video(request: DecodeRequest, content: bytes) -> Decoded:
    from av.error import FFmpegError

    try:
        with open_container(io.BytesIO(content), f"{request.where}: a video") as container:
            sizes = [(stream.width, stream.height) for stream in container.streams.video]
    except (FFmpegError, ValueError) as error:
        raise UserError(f"{request.where}: the video cannot be read; expected mp4, webm or avi") from error
    for width, height in sizes:
        _check_size("video", width, height, request)
    part = {"type": "video", "bytes": content}
    frames = load_video(part, request.where, request.frames, request.rate, request.longest)
    return [(np.asarray(frame), frame.info.get("seconds")) for frame in frames]


def _audio(request: DecodeRequest, content: bytes) -> Decoded:
    rate, most = SAMPLING_RATE, request.seconds
    part = {"type": request.modality, "bytes": content}
    samples = load_audio(part, request.where, rate, longest=most + 1)
    if len(samples) > most * rate:
        raise UserError(f"{request.where}: the audio is longer than the {most:g} seconds that are accepted")
    return [(samples, None)]


_DECODERS: dict[str, Callable[[DecodeRequest, bytes], Decoded]] = {
    "image": _image,
    "video": _video,
    "speech": _audio,
    "audio": _audio,
}


def _check_size(what: str, width: int, height: int, request: DecodeRequest) -> None:
    if width * height > request.pixels or max(width, height) > request.side:
        found = f"the {what} has {width} x {height} pixels"
        raise UserError(f"{request.where}: {found}; {_most_pixels(request)}")


def _most_pixels(request: DecodeRequest) -> str:
    return f"at most {request.pixels:,} are accepted, and {request.side:,} on a side"


def _limit_memory(extra: int) -> None:
    """Allow ``extra`` bytes of address space beyond what the process has now."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + extra, now + extra))


def main() -> None:
    """Answer requests until standard input ends."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    memory = int(sys.argv[1])
    try:
        _limit_memory(memory)
    except OSError:
        pass  # no /proc: the limit on time remains
    answers.write(READY)
    answers.flush()
    while line := requests.readline():
        header = json.loads(line)
        content = requests.read(header.pop("size"))
        request = DecodeRequest(**header)
        try:
            decoded = decode(request, content)
        except MemoryError:
            error = f"{request.where}: the {request.modality} takes more than {memory >> 20} MB to decode"
            answers.write(json.dumps({"error": error}).encode() + b"\n")
        except UserError as error:
            answers.write(json.dumps({"error": str(error)}).encode() + b"\n")
        except Exception as error:  # noqa: BLE001  (a codec's own; the next request is answered)
            reason = f"{request.where}: the {request.modality} cannot be decoded: {first_line(error)}"
            answers.write(json.dumps({"error": reason}).encode() + b"\n")
        else:
            items = [{"shape": a.shape, "dtype": a.dtype.name, "seconds": seconds} for a, seconds in decoded]
            answers.write(json.dumps({"items": items}).encode() + b"\n")
            for array, _ in decoded:
                answers.write(np.ascontiguousarray(array).tobytes())
        answers.flush()


if __name__ == "__main__":
    main()
