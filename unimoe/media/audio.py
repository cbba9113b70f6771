"""Decode speech and other audio to mono float32."""

import logging
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from unimoe.errors import UserError, first_line

from .container import open_container
from .source import Part, describe, open_media

logger = logging.getLogger(__name__)

_BLOCK = 1 << 16  # samples of all channels decoded at a time
_RATES = (100, 1_000_000)  # Hz; what the resampler supports

_Block = tuple[np.ndarray, int, float]
"""Mono samples, sampling rate in Hz, seconds that the file announces."""


def load_audio(part: Part, where: str, rate: int = 16000, longest: float | None = None) -> np.ndarray:
    """Decode a speech or audio part to mono float32 [samples] at ``rate`` Hz; channels are averaged.

    Args:
        part: holds ``path``, ``bytes``, a data URL ``url``, or a decoded array under its own type ([samples]
            or [samples, channels], in Hz by ``sampling_rate``, else at ``rate``). libsndfile decodes wav,
            flac, ogg, mp3, aiff, ...; PyAV, if installed, the audio of m4a, webm, aac, mp4, ...
        where: what errors start with.
        rate: of the result, in Hz.
        longest: seconds; the rest is dropped with a warning, and not decoded.

    Raises:
        UserError: the audio is unreadable, empty, or not finite.
    """
    array = part.get(part["type"])
    if array is not None:
        samples, found_rate = np.asarray(array), part.get("sampling_rate", rate)
        if samples.ndim not in (1, 2) or (samples.ndim == 2 and samples.shape[0] < samples.shape[1]):
            found = f"{where}: the audio has the shape {list(samples.shape)}"
            raise UserError(f"{found}, expected [samples] or [samples, channels]")
        if samples.dtype == np.uint8:  # as in a wav file: 128 is silence
            samples = (samples - 128.0) / 128
        if np.issubdtype(samples.dtype, np.signedinteger):
            samples = samples / -float(np.iinfo(samples.dtype.name).min)
        seconds = len(samples) / max(found_rate, 1)
        samples = samples[: _limit(longest, found_rate)]
    else:
        blocks, count, found_rate, seconds = [], 0, rate, 0.0
        for block, found_rate, announced in _blocks(part, where):
            blocks.append(block)
            count += len(block)
            seconds = count / found_rate
            if longest is not None and seconds >= longest:
                seconds = announced
                break
        samples = np.concatenate(blocks)[: _limit(longest, found_rate)] if blocks else np.zeros(0, np.float32)
    _check(samples, found_rate, part, where)
    if longest and seconds > longest:
        found = f"{where}: the audio {describe(part)} lasts {seconds:.0f} s"
        logger.warning("%s; what follows after %.0f s is dropped (max_windows)", found, longest)
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    if found_rate != rate:
        resampled = soxr.resample(samples, found_rate, rate)
        samples = resampled if resampled.size else samples[:1]  # a few samples at a high rate
    return np.ascontiguousarray(samples, dtype=np.float32)


def check_audio(part: Part, where: str) -> None:
    """Decode audio to its end without keeping it.

    Raises:
        UserError: as :func:`load_audio` does.
    """
    rate, empty = _RATES[0], True
    for block, rate, _ in _blocks(part, where):
        empty = False
        _check(block, rate, part, where)
    if empty:
        _check(np.zeros(0), rate, part, where)


def _blocks(part: Part, where: str) -> Iterator[_Block]:
    """Decoded blocks; only the first may be empty. Nothing is allocated that only a broken header claims."""
    with open_media(part, where) as encoded:
        try:
            file = soundfile.SoundFile(encoded)
        except (RuntimeError, ValueError, TypeError) as error:  # soundfile's own error is a RuntimeError
            encoded.seek(0)
            yield from _container_blocks(encoded, part, where, error)
            return
        try:
            with file:
                size = max(1, _BLOCK // file.channels)
                block, seconds = (
                    file.read(size, dtype="float32", always_2d=True),
                    file.frames / file.samplerate,
                )
                yield block.mean(axis=1), file.samplerate, seconds
                while len(block := file.read(size, dtype="float32", always_2d=True)):
                    yield block.mean(axis=1), file.samplerate, seconds
        except (RuntimeError, ValueError, TypeError) as error:
            raise _undecodable(part, where, first_line(error)) from error


def _container_blocks(encoded: BinaryIO, part: Part, where: str, first_error: Exception) -> Iterator[_Block]:
    """The audio of a container that libsndfile does not know."""
    reason = first_line(first_error).rpartition(">: ")[2]  # without our buffer's name
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        expected = "expected wav, flac, ogg or mp3; m4a, webm, aac and others need PyAV"
        message = f"{reason}; {expected}: pip install 'unimoe[video]'"
        raise _undecodable(part, where, message) from first_error
    try:
        container = open_container(encoded, where)
    except (FFmpegError, ValueError):
        message = f"{reason}; expected wav, flac, ogg, mp3, m4a or webm"
        raise _undecodable(part, where, message) from first_error
    with container:
        if not container.streams.audio:
            held = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
            raise _undecodable(part, where, f"it holds no audio, only {held}")
        seconds = (container.duration or 0) / 1e6
        resampler, rate = av.AudioResampler(format="fltp"), 0
        try:
            for frame in container.decode(container.streams.audio[0]):
                if rate not in (0, frame.sample_rate):
                    found = f"its rate changes from {rate} to {frame.sample_rate} Hz"
                    raise _undecodable(part, where, found)
                rate = frame.sample_rate
                for planar in resampler.resample(frame):
                    yield planar.to_ndarray().mean(axis=0), rate, seconds
        except UserError:
            raise
        except (FFmpegError, ValueError) as error:
            raise _undecodable(part, where, first_line(error)) from error


def _undecodable(part: Part, where: str, reason: str) -> UserError:
    return UserError(f"{where}: cannot decode the audio {describe(part)}: {reason}")


def _check(samples: np.ndarray, rate: float, part: Part, where: str) -> None:
    found = f"{where}: the audio {describe(part)}"
    if not _RATES[0] <= rate <= _RATES[1]:
        raise UserError(f"{found} has {rate} samples a second, expected {_RATES[0]} to {_RATES[1]:,}")
    if not samples.size:
        raise UserError(f"{found} holds no samples")
    if not np.isfinite(samples).all():
        raise UserError(f"{found} holds values that are not finite numbers")


def _limit(longest: float | None, rate: float) -> int | None:
    """The number of samples in ``longest`` seconds."""
    return None if longest is None else round(longest * rate)
