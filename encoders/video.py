"""Video: any image encoder over the frames.

Shapes: B videos, F frames of the longest, N frames of all videos, S positions of a frame, D width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unimoe.errors import UserError

from .encoder import Encoder, ImageEncoder, build_encoder, encoder_class


@dataclass
class FramesConfig:
    image: dict[str, Any]
    """Configuration of the image encoder that sees each frame."""
    frames: int = 8
    """Frames of a video, at even distances over all of it; with ``rate`` the most of them."""
    rate: float | None = None
    """Frames a second to take instead; a video too long for ``frames`` of them is taken at even distances."""


class FramesEncoder(Encoder):
    """``forward(video_pixels [B, F, 3, H, W], frames_B) -> (features [B, F * S, D], lengths_B)``.

    The tower sees each frame as an image: the frames before and after do not affect its features. These stand
    frame by frame, in order, and are zero beyond a video's own frames, which the tower does not run on.
    """

    kind = "frames"
    modality = "video"
    Config = FramesConfig

    def __init__(self, config: FramesConfig):
        if config.frames < 1 or (config.rate is not None and config.rate <= 0):
            found = f"frames {config.frames} and rate {config.rate}"
            raise UserError(f"frames: found {found}, expected frames of at least 1 and a rate above 0")
        super().__init__(config)
        image = build_encoder(config.image)
        if not isinstance(image, ImageEncoder):
            raise UserError(f"frames: image is of type {image.kind!r}, which is not for images")
        self.image = image
        self.config["image"] = image.config
        self.hidden_size = image.hidden_size
        self.preprocessing = {**image.preprocessing, "frames": config.frames, "rate": config.rate}
        self.preprocessing["positions"] = self.positions

    @property
    def tower(self) -> nn.Module:
        return self.image.tower

    @property
    def positions(self) -> int:
        """S, the positions of one frame."""
        return self.image.num_tokens

    @classmethod
    def complete(cls, config: dict[str, Any], weights: str | None) -> dict[str, Any]:
        image = config.get("image") or {}
        return {**config, "image": encoder_class(image).complete(image, weights)}

    def load_weights(self, weights: str) -> None:
        """Fill the image encoder, from what that understands."""
        self.image.load_weights(weights)

    def num_tokens(self, frames: int) -> int:
        """The number of positions of a video of so many frames."""
        return frames * self.positions

    def forward(self, video_pixels: Tensor, frames_B: Tensor) -> tuple[Tensor, Tensor]:
        most = video_pixels.shape[1]
        frames_B = frames_B.to(video_pixels.device)
        if int(frames_B.min()) < 1 or int(frames_B.max()) > most:
            raise UserError(f"videos of {frames_B.tolist()} frames, expected 1 to {most}")
        inside_BF = torch.arange(most, device=video_pixels.device) < frames_B[:, None]
        features_NSD, _ = self.image(video_pixels[inside_BF])
        features_BFSD = features_NSD.new_zeros(*inside_BF.shape, *features_NSD.shape[1:])
        features_BFSD[inside_BF] = features_NSD
        return features_BFSD.flatten(1, 2), self.positions * frames_B
