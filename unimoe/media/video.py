"""Decode a few frames of a video, in order, from a file or from a list of images.

file -> times of all frames (nothing decoded) -> the chosen ones -> decoded, each from the key frame before it
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from unimoe.errors import UserError

from .container import is_cover, open_container, require_av
from .image import load_image
from .source import Part, describe, frame_parts, open_media

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

_WHOLE = 0.9
"""Share of the announced frames that must be present, or the file is called truncated."""


def load_video(
    part: Part, where: str, frames: int = 8, rate: float | None = None, longest: int | None = None
) -> list[Image.Image]:
    """Decode a video part to upright RGB frames in order; ``info["seconds"]`` of a frame is its presentation
    time, if the video has one.

    Args:
        part: holds ``path``, ``bytes`` or a data URL ``url``, of a file or, as a list, of images; or images
            under ``video``.
        where: what errors start with.
        frames: how many to take, evenly spaced from the first to the last; all frames of a shorter video.
        rate: frames to take per second, unless that gives more than ``frames``. A list of images has no
            times: of it ``frames`` are taken.
        longest: scale frames down to this many pixels on the longer side.

    Raises:
        UserError: the video cannot be decoded, is truncated, or holds no frames.
    """
    images = frame_parts(part)
    if part.get("video") is not None:
        images = [{"type": "image", "image": image} for image in part["video"]]
    if images is None:
        return _decode(part, where, frames, rate, longest)
    if not images:
        raise UserError(f"{where}: the video {describe(part)} holds no frames")
    return [load_image(images[index], where, longest) for index in spread(range(len(images)), frames)]


def spread(times: Any, frames: int, rate: float | None = None) -> list[int]:
    """Indices of the frames to take, increasing, each once.

    ``times``: presentation times, increasing; in seconds if there is a ``rate``.
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
    av = require_av(f"{where}: a video file")
    what = f"{where}: the video {describe(part)}"
    with open_media(part, where) as file:
        try:
            with open_container(file, what) as container:
                return _frames(container, what, frames, rate, longest)
        except UserError:
            raise
        except (av.error.FFmpegError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"{where}: cannot decode the video {describe(part)}: {reason}") from error


def _frames(
    container: "InputContainer", what: str, frames: int, rate: float | None, longest: int | None
) -> list[Image.Image]:
    stream = next((stream for stream in container.streams.video if not is_cover(stream)), None)
    if stream is None:
        held = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise UserError(f"{what} holds no frames; it holds {held}")
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
        raise UserError(f"{what} is truncated: it announces {stream.frames} frames and holds {len(times)}")
    seconds, alone = (container.duration or 0) / 1e6, len(container.streams) == 1  # audio may last longer
    end = max(pts + duration for pts, _, duration in shown) * tick  # the last frame may be shown for long
    if alone and stream.frames != len(times) and end - times[0] * tick < _WHOLE * seconds - 1:
        raise UserError(f"{what} is truncated: it announces {seconds:.1f} s and ends at {end:.1f} s")
    chosen = [times[index] for index in spread([time * tick for time in times], frames, rate)]

    images: list[Image.Image] = []
    reader = _Reader(container, stream, times, keys)
    for time in chosen:
        frame = reader.read(time)
        if frame is None:
            raise UserError(f"{what} is truncated: its frame at {time * tick:.2f} s cannot be decoded")
        image = frame.to_image()
        if frame.rotation:
            image = image.rotate(frame.rotation, expand=True)
        if longest:
            image.thumbnail((longest, longest))
        image.info["seconds"] = (time - times[0]) * tick
        images.append(image)
    return images


class _Reader:
    """Decodes frames of a video stream, each later than the one before."""

    def __init__(
        self, container: "InputContainer", stream: "VideoStream", times: list[int], keys: list[int]
    ) -> None:
        """``times`` of all packets, and of the ``keys`` among them, increasing, in ticks of the stream."""
        self.container, self.stream, self.times = container, stream, times
        # AVI has decoding times, not presentation times: with B-frames only the frames' order is known.
        # An MPEG program stream has times for some frames only, and wrong ones after a seek.
        self.untimed = container.format.name == "avi" and self.stream.codec_context.has_b_frames
        self.keys = [] if self.untimed or container.format.name == "mpeg" else keys
        self.decoded: Iterator[tuple[int, VideoFrame]] = iter(())
        self.at: int | None = None
        self.sought = False

    def read(self, time: int) -> "VideoFrame | None":
        """The frame of ``time``, or None if it is missing even after decoding everything before it.

        In MPEG-TS a seek may end after its key frame. Then the key frame before that is tried, and at last
        the start of the file.
        """
        before = self.keys[: bisect_right(self.keys, time)]
        frame = None
        if self.at is not None and not (before and before[-1] > self.at):  # else skip to the key frame
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
        """Decode from the key frame at ``start``; None: from the start of the file."""
        self.sought = start is not None
        self.container.seek(min(0, self.times[0]) if start is None else start, stream=self.stream)
        frames = self.container.decode(self.stream)
        if self.untimed:
            self.decoded = zip(self.times, frames, strict=False)
        else:
            self.decoded = ((frame.pts, frame) for frame in frames if frame.pts is not None)

    def _next(self, time: int, key: int | None = None) -> "VideoFrame | None":
        """Decode up to ``time``; None if there is no such frame, or the first one is later than ``key``."""
        for at, frame in self.decoded:
            self.at = at
            if key is not None and at > key:
                return None
            if at >= time:  # without a seek nothing was skipped: a later frame is the next one
                return frame if at == time or not self.sought else None
            key = None
        return None


def write_video(path: str | Path, frames: Sequence[Image.Image], rate: float) -> None:
    """Encode RGB images of one size (with even sides) as MP4, ``rate`` frames per second.

    The codec is H.264, which browsers play, if this PyAV can encode it, else MPEG-4.

    Raises:
        UserError: PyAV is not installed.
    """
    av = require_av("writing a video")
    with av.open(str(path), "w", format="mp4") as container:
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        stream = container.add_stream(codec, rate=Fraction(rate).limit_denominator(1001))
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 1_000_000
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
