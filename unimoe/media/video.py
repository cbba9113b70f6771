"""Decoding moving pictures: a few frames, in order, out of a file or a list of pictures.

file -> times of all its frames (nothing decoded) -> which ones -> decoded, from the key frame before each
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from unimoe.errors import UserError

from .decode import describe, frame_parts, load_image, open_media
from .part import Part

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer

_WHOLE = 0.9
"""Share of the frames that a file announces which must be there, or it is called cut off."""


def load_video(
    part: Part, where: str, frames: int = 8, rate: float | None = None, longest: int | None = None
) -> list[Image.Image]:
    """Decode a video part to RGB frames in the order of time, upright; ``info["seconds"]`` of each says when
    it is shown, where the video has a clock.

    ``part`` holds ``path``, ``bytes`` or a data URL ``url``, of a file or a list of those of pictures, or
    pictures under ``video``.

    Args:
        where: what errors begin with.
        frames: as many, at even distances from the first to the last; of a shorter video all.
        rate: take so many a second instead, and ``frames`` at even distances where these are more. A list of
            pictures has no clock: of it ``frames`` are taken.
        longest: scale frames down to so many pixels on the longer side.

    Raises UserError for a video that cannot be decoded, is cut off, or holds no frames.
    """
    pictures = frame_parts(part)
    if part.get("video") is not None:
        pictures = [{"type": "image", "image": picture} for picture in part["video"]]
    if pictures is None:
        return _decode(part, where, frames, rate, longest)
    if not pictures:
        raise UserError(f"{where}: the video {describe(part)} holds no frames")
    return [load_image(pictures[index], where, longest) for index in spread(range(len(pictures)), frames)]


def spread(times: Any, frames: int, rate: float | None = None) -> list[int]:
    """Indices of the frames to take, rising and each once.

    ``times``: when each frame is shown, rising; in seconds if there is a ``rate``.
    """
    first, last = times[0], times[-1]
    if rate and (last - first) * rate < frames:
        wanted = np.arange(first, last + 1e-6, 1 / rate)
    else:
        wanted = np.linspace(first, last, frames)
    places = (_nearest(times, time) for time in wanted)
    return list(dict.fromkeys(places))


def _nearest(times: Any, time: float) -> int:
    right = min(bisect_left(times, time), len(times) - 1)
    return right - 1 if right and time - times[right - 1] <= times[right] - time else right


def _decode(
    part: Part, where: str, frames: int, rate: float | None, longest: int | None
) -> list[Image.Image]:
    av = _av(f"{where}: a video file")
    what = f"{where}: the video {describe(part)}"
    with open_media(part, where) as file:
        try:
            with av.open(file) as container:
                return _frames(container, what, frames, rate, longest)
        except UserError:
            raise
        except (av.error.FFmpegError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"{where}: cannot decode the video {describe(part)}: {reason}") from error


def _frames(
    container: "InputContainer", what: str, frames: int, rate: float | None, longest: int | None
) -> list[Image.Image]:
    if not container.streams.video:
        held = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise UserError(f"{what} holds no pictures; it holds {held}")
    stream = container.streams.video[0]
    shown = [
        (packet.pts, packet.is_keyframe, packet.duration or 0)
        for packet in container.demux(stream)
        if packet.pts is not None and not packet.is_discard
    ]
    if not shown:
        raise UserError(f"{what} holds no frames")
    times, keys = sorted(pts for pts, *_ in shown), sorted(pts for pts, is_key, _ in shown if is_key)
    tick = float(stream.time_base or 1)
    whole = stream.duration and times[-1] - times[0] >= _WHOLE * stream.duration  # trimmed by an edit list
    if stream.frames and len(times) < _WHOLE * stream.frames and not whole:
        raise UserError(f"{what} is cut off: it announces {stream.frames} frames and holds {len(times)}")
    seconds, alone = (container.duration or 0) / 1e6, len(container.streams) == 1  # a sound may last longer
    end = max(pts + duration for pts, _, duration in shown) * tick  # the last frame may be held for long
    if alone and stream.frames != len(times) and end - times[0] * tick < _WHOLE * seconds - 1:
        raise UserError(f"{what} is cut off: it announces {seconds:.1f} s and ends at {end:.1f} s")
    chosen = [times[index] for index in spread([time * tick for time in times], frames, rate)]

    pictures: list[Image.Image] = []
    reader = _Reader(container, times, keys)
    for time in chosen:
        frame = reader.read(time)
        if frame is None:
            raise UserError(f"{what} is cut off: its frame at {time * tick:.2f} s cannot be decoded")
        picture = frame.to_image()
        if frame.rotation:
            picture = picture.rotate(frame.rotation, expand=True)
        if longest:
            picture.thumbnail((longest, longest))
        picture.info["seconds"] = (time - times[0]) * tick
        pictures.append(picture)
    return pictures


class _Reader:
    """Decodes frames of a container's first video stream, each later than the one before."""

    def __init__(self, container: "InputContainer", times: list[int], keys: list[int]) -> None:
        """``times`` of all packets, and of the ``keys`` among them, rising, in ticks of the stream."""
        self.container, self.stream, self.times = container, container.streams.video[0], times
        # AVI says when a frame is decoded, not when it is shown: with B-frames only their order is known.
        # An MPEG program stream has times for some frames only; after a seek they are guessed wrongly.
        self.untimed = container.format.name == "avi" and self.stream.codec_context.has_b_frames
        self.keys = [] if self.untimed or container.format.name == "mpeg" else keys
        self.decoded: Iterator[tuple[int, VideoFrame]] = iter(())
        self.at: int | None = None
        self.sought = False

    def read(self, time: int) -> "VideoFrame | None":
        """The frame that is shown at ``time``, or None if there is none even when all before it is decoded.

        In MPEG-TS a seek may end behind the key frame it is for. Then it is tried from the key frame before,
        at last from the start.
        """
        before = self.keys[: bisect_right(self.keys, time)]
        frame = None
        if self.at is not None and not (before and before[-1] > self.at):  # else all up to it can be skipped
            frame = self._next(time)
        for start in before[:-3:-1]:
            if frame is None:
                self._seek(start)
                frame = self._next(time, before[-1])
        if frame is None:
            self._seek(None)
            frame = self._next(time)
        return frame

    def _seek(self, start: int | None) -> None:
        """Decode from the key frame at ``start`` on; None: from the start of the file."""
        self.sought = start is not None
        self.container.seek(min(0, self.times[0]) if start is None else start, stream=self.stream)
        frames = self.container.decode(self.stream)
        if self.untimed:
            self.decoded = zip(self.times, frames, strict=False)
        else:
            self.decoded = ((frame.pts, frame) for frame in frames if frame.pts is not None)

    def _next(self, time: int, key: int | None = None) -> "VideoFrame | None":
        """Decode up to ``time``; None if there is no such frame, or the first one is behind ``key``."""
        for at, frame in self.decoded:
            self.at = at
            if key is not None and at > key:
                return None
            if at >= time:  # decoded from the start on, where nothing is skipped, a later one is the next one
                return frame if at == time or not self.sought else None
            key = None
        return None


def write_video(path: str | Path, frames: Sequence[Image.Image], rate: float) -> None:
    """Encode RGB pictures of one size (of even sides), ``rate`` a second, as MP4.

    H.264, which browsers play, where this PyAV has an encoder for it, else MPEG-4. Raises UserError when PyAV
    is not installed.
    """
    av = _av("writing a video")
    with av.open(str(path), "w", format="mp4") as container:
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        stream = container.add_stream(codec, rate=Fraction(rate).limit_denominator(1001))
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 1_000_000
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


def _av(what: str) -> Any:
    try:
        import av
    except ImportError as error:
        raise UserError(f"{what} needs PyAV: pip install 'unimoe[video]'") from error
    return av
