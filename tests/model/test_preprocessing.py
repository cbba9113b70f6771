import pytest
import torch
from PIL import Image

from unimoe.encoders import build_encoder
from unimoe.errors import UserError
from unimoe.model.preprocessing import ImagePreprocessor

MEAN, STD = [0.2, 0.4, 0.6], [0.5, 0.5, 0.5]


def pixels(fit: str, picture: Image.Image) -> torch.Tensor:
    """[3, 8, 8], on the scale 0..1"""
    config = {"image_size": 8, "mean": MEAN, "std": STD, "positions": 4, "fit": fit}
    found = ImagePreprocessor("image", config, {"type": "linear"}).pixels(picture)
    return found * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]


def test_ways_to_a_square():
    """A picture three times as wide as high: black, white, black."""
    picture = Image.new("RGB", (48, 16))
    picture.paste("white", (16, 0, 32, 16))
    stretched, cropped, padded = (pixels(fit, picture) for fit in ("stretch", "crop", "pad"))
    assert stretched[:, :, 0].max() < 0.1 and stretched[:, :, 4].min() > 0.9  # all of it, top to bottom
    assert cropped.min() > 0.9  # the white middle alone
    torch.testing.assert_close(padded[:, 0, :], torch.tensor(MEAN)[:, None].expand(3, 8), atol=0.01, rtol=0)
    assert padded[:, 4, 0].max() < 0.1 and padded[:, 4, 4].min() > 0.9


def test_an_unknown_way_is_named():
    with pytest.raises(UserError, match="clip: fit is 'squeeze', expected stretch, crop or pad"):
        build_encoder({"type": "clip", "fit": "squeeze"})
