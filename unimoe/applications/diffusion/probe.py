"""How often a linear probe on a pretrained encoder's features recognises the class of a drawn image.

Shapes: N images, S side, D features, K classes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from unimoe.encoders.ridge import ridge_map
from unimoe.encoders.timm_image import TimmConfig, TimmImageEncoder
from unimoe.prepare import default_part
from unimoe.prepare.efficientnet import TIMM_NAME

Features = Callable[[Tensor], Tensor]
"""[N, 3, S, S] in -1..1 -> [N, D]."""
SIDE = 96
RIDGE = 500.0
"""Chosen on the validation sprites."""


def pretrained_features(batch: int = 64) -> Features:
    """EfficientNet-Lite0's features, averaged over positions, of images enlarged to 96 pixels.

    Raises:
        UserError: the part ``image`` is not prepared.
    """
    encoder = TimmImageEncoder(TimmConfig(TIMM_NAME, image_size=SIDE)).eval()
    encoder.load_weights(str(default_part("image")))
    mean, std = (torch.tensor(encoder.preprocessing[name])[:, None, None] for name in ("mean", "std"))

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        found = []
        for part in images.split(batch):
            pixels = F.interpolate(part.clamp(-1, 1), (SIDE, SIDE), mode="bilinear", align_corners=False)
            found.append(encoder.features(((pixels + 1) / 2 - mean) / std).mean(dim=1))
        return torch.cat(found)

    return features


class LinearProbe:
    """Ridge regression from features to classes."""

    def __init__(self, features: Features, images: Tensor, label_N: Tensor):
        self.features = features
        self.weight_KD, self.bias_K = ridge_map(features(images), F.one_hot(label_N).float(), RIDGE)

    def accuracy(self, images: Tensor, label_N: Tensor) -> float:
        """Share of images whose class it names."""
        scores_NK = self.features(images).double() @ self.weight_KD.T + self.bias_K
        return float((scores_NK.argmax(dim=1) == label_N).float().mean())
