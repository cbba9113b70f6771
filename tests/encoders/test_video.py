import pytest
import torch

from unimoe.encoders import build_encoder, load_encoder
from unimoe.errors import UserError

IMAGE = {"type": "timm", "name": "test_efficientnet", "image_size": 64}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return build_encoder({"type": "frames", "image": IMAGE, "frames": 6}).eval()


@torch.no_grad()
def test_a_frame_is_a_picture_and_padding_is_not_seen(encoder):
    pixels = torch.randn(2, 3, 3, 64, 64)
    features, lengths = encoder(pixels, torch.tensor([3, 1]))
    assert features.shape == (2, 3 * encoder.positions, encoder.hidden_size)
    assert lengths.tolist() == [3 * encoder.positions, encoder.positions]
    third = encoder.image(pixels[0, 2:3])[0]
    torch.testing.assert_close(features[0, 2 * encoder.positions :], third[0], atol=1e-5, rtol=1e-5)
    assert not features[1, encoder.positions :].any()
    changed = pixels.clone()
    changed[1, 1:] = 9.0
    assert torch.equal(encoder(changed, torch.tensor([3, 1]))[0], features)


def test_the_configuration_makes_the_same_again(encoder):
    again = build_encoder(encoder.config)
    again.load_state_dict(encoder.state_dict())
    assert again.config == encoder.config and again.preprocessing == encoder.preprocessing
    assert again.preprocessing["frames"] == 6 and again.preprocessing["positions"] == 4


def test_the_weights_are_the_image_encoders(encoder, tmp_path):
    torch.save(encoder.tower.state_dict(), tmp_path / "tower.pt")
    loaded = load_encoder({"type": "frames", "image": IMAGE}, tmp_path / "tower.pt")
    for name, tensor in encoder.image.state_dict().items():
        assert torch.equal(tensor, loaded.image.state_dict()[name])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"frames": 0}, "frames of at least 1"),
        ({"rate": 0.0}, "rate above 0"),
        ({"image": {"type": "frames", "image": IMAGE}}, "which is not for images"),
    ],
)
def test_bad_settings(config, message):
    with pytest.raises(UserError, match=message):
        build_encoder({"type": "frames", "image": IMAGE, **config})
