"""Preprocessing of a part of a message: what its encoder takes, and the number of tokens it becomes.

    part -> load (decoded, as little of it as is needed) -> encoder inputs, number of tokens, span

Each class is made from the ``preprocessing`` part of a modality in the processor's configuration, and is a
:class:`~unimoe.model.inputs.Preprocessor`.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import CLIPImageProcessor, WhisperFeatureExtractor

from unimoe.encoders import num_tokens
from unimoe.encoders.beats import BeatsEncoder, fbank
from unimoe.errors import UserError
from unimoe.media.audio import load_audio
from unimoe.media.image import load_image
from unimoe.media.source import Part
from unimoe.media.video import load_video

from .configuration import MEDIA_INPUTS
from .inputs import EncoderInputs, Prepared, Preprocessor
from .rope_3d import Span, image_span

_ROOM = 8
"""Images are decoded to at most so many times the encoder's side, which bounds the memory of huge ones."""


class ImagePreprocessor:
    """RGB images to [3, S, S]: resized to the encoder's square, normalised.

    Args of ``config``: ``image_size`` (pixels), ``mean`` and ``std`` (3 numbers each, of pixels in 0..1),
    ``interpolation`` (PIL's name), ``positions`` (encoder positions of an image), ``fit``: ``stretch``
    (default; all of it stays in view), ``crop`` (its longer sides are cut) or ``pad`` (bars of the mean).
    """

    def __init__(self, modality: str, config: dict[str, Any], connector: dict[str, Any]):
        self.outputs = MEDIA_INPUTS[modality]
        size, self.fit = config["image_size"], config.get("fit", "stretch")
        self.mean = tuple(int(255 * channel) for channel in config["mean"])
        resample = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}[
            config.get("interpolation", "bicubic")
        ]
        self.processor = CLIPImageProcessor(
            size={"shortest_edge": size} if self.fit == "crop" else {"height": size, "width": size},
            do_center_crop=self.fit == "crop",
            crop_size={"height": size, "width": size},
            resample=resample,
            image_mean=config["mean"],
            image_std=config["std"],
        )
        self.longest = _ROOM * size
        self.positions = config["positions"]
        self.connector = connector

    def load(self, part: Part, where: str) -> Part:
        return {**part, "image": load_image(part, where, self.longest)}

    def __call__(self, part: Part, where: str) -> Prepared:
        pixels = self.pixels(self.load(part, where)["image"])
        tokens = num_tokens(self.connector, self.positions)
        return Prepared({self.outputs[0]: [pixels]}, tokens, image_span(tokens))

    def pixels(self, image: Image.Image) -> Tensor:
        """[3, S, S]"""
        image = image.convert("RGB")
        if self.fit == "pad":
            image = ImageOps.pad(image, (max(image.size), max(image.size)), color=self.mean)
        return self.processor(image, return_tensors="pt")["pixel_values"][0]


class VideoPreprocessor(ImagePreprocessor):
    """Frames to [frames, 3, S, S], each as an image.

    Further args of ``config``: ``frames`` and ``rate`` as of :func:`unimoe.media.video.load_video`;
    ``positions`` are those of a frame.
    """

    def __init__(self, modality: str, config: dict[str, Any], connector: dict[str, Any]):
        super().__init__(modality, config, connector)
        self.frames, self.rate = config["frames"], config.get("rate")

    def load(self, part: Part, where: str) -> Part:
        return {**part, "video": load_video(part, where, self.frames, self.rate, self.longest)}

    def __call__(self, part: Part, where: str) -> Prepared:
        frames: list[Image.Image] = self.load(part, where)["video"]
        if not 1 <= len(frames) <= self.frames:
            raise UserError(f"{where}: a video has {len(frames)} frames, expected 1 to {self.frames}")
        values = [torch.stack([self.pixels(frame) for frame in frames])], [torch.tensor(len(frames))]
        tokens = num_tokens(self.connector, len(frames) * self.positions)
        return Prepared(dict(zip(self.outputs, values, strict=True)), tokens, self.span(frames, tokens))

    def span(self, frames: list[Image.Image], tokens: int) -> Span:
        """Span of the tokens, with the time of each frame; frames without a time of their own are taken as
        one a second."""
        if self.connector.get("time") == "mean":
            return image_span(tokens)
        seconds = [frame.info.get("seconds", float(index)) for index, frame in enumerate(frames)]
        return Span("video", tokens, image_span(tokens // len(frames)).grid, seconds)


class Spectrum(Protocol):
    """Converts a window of audio to the spectrum that an encoder takes."""

    def __call__(self, window: np.ndarray) -> Tensor:
        """[mel bins, frames] of [samples] at 16 kHz."""
        ...

    @staticmethod
    def positions(frames: int) -> int:
        """Encoder positions of so many frames."""
        ...


class AudioPreprocessor:
    """Mono audio at 16 kHz, speech or other, to windows of at most 30 s as the encoder's spectrum [mel bins,
    frames].

    A window is as long as its audio: a short clip costs little. Args of ``config``: ``spectrum`` (a key of
    SPECTRA, default ``whisper``), ``mel_bins``, ``max_windows`` (None: as many as there are).
    """

    rate = 16_000
    """Samples a second."""
    window = 30 * 16_000
    """Samples of the longest window that the encoders have positions for."""

    def __init__(self, modality: str, config: dict[str, Any], connector: dict[str, Any]):
        self.modality = modality
        self.outputs = MEDIA_INPUTS[modality]
        self.spectrum = SPECTRA[config.get("spectrum", "whisper")](config["mel_bins"])
        self.connector = connector
        most = config.get("max_windows")
        self.longest = most and most * self.window / self.rate

    def load(self, part: Part, where: str) -> Part:
        samples = load_audio(part, where, self.rate, self.longest)
        return {**part, part["type"]: samples, "sampling_rate": self.rate}

    def __call__(self, part: Part, where: str) -> Prepared:
        samples: np.ndarray = self.load(part, where)[part["type"]]
        inputs, tokens = self.windows(samples)
        return Prepared(inputs, tokens, Span("audio", tokens, seconds=(len(samples) / self.rate,)))

    def windows(self, samples: np.ndarray) -> tuple[EncoderInputs, int]:
        """The encoder inputs of each window of [samples] float in -1..1, and the number of tokens of all."""
        windows = [samples[start : start + self.window] for start in range(0, len(samples), self.window)]
        features = [self.spectrum(window) for window in windows]
        frames = [torch.tensor(one.shape[-1]) for one in features]
        tokens = sum(num_tokens(self.connector, self.spectrum.positions(one.shape[-1])) for one in features)
        return dict(zip(self.outputs, (features, frames), strict=True)), tokens


class WhisperSpectrum:
    """Whisper's log-mel, 100 frames a second, an even number of them."""

    step = 2 * 160
    """Samples of two frames, which make one position."""
    shortest = 1_600
    """Samples (0.1 s) to which shorter clips are padded with silence."""

    def __init__(self, mel_bins: int):
        self.extractor = WhisperFeatureExtractor(feature_size=mel_bins)

    def __call__(self, window: np.ndarray) -> Tensor:
        """[mel bins, frames] of [samples]."""
        samples = max(self.shortest, math.ceil(len(window) / self.step) * self.step)
        padded = np.pad(window, (0, samples - len(window)))
        mel = self.extractor(
            padded, sampling_rate=16_000, padding="do_not_pad", truncation=False, return_tensors="pt"
        )
        return mel["input_features"][0]

    @staticmethod
    def positions(frames: int) -> int:
        """Encoder positions of so many frames."""
        return math.ceil(frames / 2)


class BeatsSpectrum:
    """Kaldi's filter bank as BEATs wants it; see :func:`unimoe.encoders.beats.fbank`."""

    shortest = 2_800
    """Samples of 16 frames, one patch, to which shorter clips are padded with silence."""
    positions = staticmethod(BeatsEncoder.num_tokens)
    """Encoder positions of so many frames."""

    def __init__(self, mel_bins: int):
        if mel_bins != BeatsEncoder.num_mel_bins:
            raise UserError(f"mel_bins is {mel_bins}, expected {BeatsEncoder.num_mel_bins} for BEATs")

    def __call__(self, window: np.ndarray) -> Tensor:
        """[mel bins, frames] of [samples]."""
        return fbank(torch.from_numpy(np.pad(window, (0, max(0, self.shortest - len(window))))))


SPECTRA: dict[str, Callable[[int], Spectrum]] = {"whisper": WhisperSpectrum, "beats": BeatsSpectrum}

PREPROCESSORS: dict[str, Callable[[str, dict[str, Any], dict[str, Any]], Preprocessor]] = {
    "image": ImagePreprocessor,
    "video": VideoPreprocessor,
    "speech": AudioPreprocessor,
    "audio": AudioPreprocessor,
}
"""Preprocessor of each modality; it is made of the modality, its ``preprocessing`` and its ``connector``
configuration."""
