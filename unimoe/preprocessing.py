"""From a decoded picture or sound to what its encoder takes, and to the number of tokens it will become.

Each class is made from the ``preprocessing`` part of a modality in the processor's configuration.
"""

import math

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPImageProcessor, WhisperFeatureExtractor

from unimoe.encoders import num_tokens

from .errors import UserError


class ImagePreprocessor:
    """RGB pictures to [3, S, S]: resized to the encoder's square (all of it stays in view), normalised.

    Args of ``config``: ``image_size`` (pixels), ``mean`` and ``std`` (3 numbers each, of pixels in 0..1),
    ``interpolation`` (PIL's name), ``positions`` (encoder positions of a picture).
    """

    outputs = ("pixel_values",)

    def __init__(self, config: dict, connector: dict):
        size = config["image_size"]
        resample = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}[
            config.get("interpolation", "bicubic")
        ]
        self.processor = CLIPImageProcessor(
            size={"height": size, "width": size},
            do_center_crop=False,
            resample=resample,
            image_mean=config["mean"],
            image_std=config["std"],
        )
        self.tokens = num_tokens(connector, config["positions"])

    def __call__(self, image) -> tuple[dict[str, list[Tensor]], int]:
        """``image``: a PIL picture. Returns the encoder inputs of this item and its number of tokens."""
        pixels = self.processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": [pixels]}, self.tokens


class SpeechPreprocessor:
    """Mono sound at 16 kHz to log-mel windows of at most 30 s [mel bins, frames], 100 frames a second.

    A window is as long as its sound: a short clip costs little. Args of ``config``: ``mel_bins``.
    """

    outputs = ("speech_features", "speech_frames")
    rate = 16_000
    """Samples a second."""
    window = 30 * 16_000
    """Samples of the longest window that Whisper's encoder has positions for."""
    hop = 160
    """Samples from one mel frame to the next."""
    shortest = 1_600
    """Samples (0.1 s) to which shorter clips are padded with silence."""

    def __init__(self, config: dict, connector: dict):
        self.extractor = WhisperFeatureExtractor(feature_size=config["mel_bins"])
        self.connector = connector

    def __call__(self, sound: np.ndarray) -> tuple[dict[str, list[Tensor]], int]:
        """``sound``: [samples] float in -1..1.

        Returns the encoder inputs of each window and the number of tokens of all.
        """
        sound = np.asarray(sound, dtype=np.float32)
        if sound.ndim != 1 or not len(sound):
            raise UserError(
                f"speech must be one channel of at least one sample, found an array of shape {sound.shape}"
            )
        features, frames, tokens = [], [], 0
        for start in range(0, len(sound), self.window):
            window = sound[start : start + self.window]
            samples = max(
                self.shortest, math.ceil(len(window) / (2 * self.hop)) * 2 * self.hop
            )  # an even number of frames
            padded = np.pad(window, (0, samples - len(window)))
            mel = self.extractor(
                padded, sampling_rate=self.rate, padding="do_not_pad", truncation=False, return_tensors="pt"
            )
            features.append(mel["input_features"][0])
            frames.append(torch.tensor(features[-1].shape[-1]))
            tokens += num_tokens(self.connector, math.ceil(features[-1].shape[-1] / 2))
        return {"speech_features": features, "speech_frames": frames}, tokens


PREPROCESSORS = {"image": ImagePreprocessor, "speech": SpeechPreprocessor}
