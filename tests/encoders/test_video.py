import pytest
import torch

from unimoe.encoders import build_connector, build_encoder, load_encoder, num_tokens
from unimoe.errors import UserError

IMAGE = {"type": "timm", "name": "test_efficientnet", "image_size": 64}
SIZES = {"frames": 6, "frame_positions": 4}


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


def connector(time, kind="pooled_mlp", **options):
    torch.manual_seed(0)
    return build_connector({"type": kind, "time": time, **SIZES, **options}, 8, 16)


@torch.no_grad()
def test_the_mean_cannot_tell_a_video_from_its_reverse():
    frames = torch.randn(1, 3, 4, 8)
    video, reverse = frames.flatten(1, 2), frames.flip(1).flatten(1, 2)
    mean, keep = connector("mean", pool=1), connector("keep", pool=1)
    torch.testing.assert_close(mean(video)[0], mean(reverse)[0])
    found = keep(video)[0]
    assert not torch.allclose(found, keep(reverse)[0])
    assert not torch.allclose(found, keep(reverse)[0].flip(1))  # its position is in a frame's token


@pytest.mark.parametrize("kind", ["linear", "mlp", "pooled_mlp", "qformer"])
@pytest.mark.parametrize("time", ["keep", "mean"])
@torch.no_grad()
def test_tokens_do_not_depend_on_longer_neighbours(kind, time):
    options = {"num_queries": 3, "num_heads": 2, "hidden_size": 8} if kind == "qformer" else {}
    built = connector(time, kind, **options)
    features = torch.randn(2, 5 * 4, 8)
    together, counts = built(features, torch.tensor([20, 8]))
    alone, count = built(features[1:, :8])
    assert counts.tolist() == [built.num_tokens(20), built.num_tokens(8)]
    assert count.tolist() == counts[1:].tolist()
    torch.testing.assert_close(together[1, : int(count)], alone[0, : int(count)])


def test_token_counts():
    shared = {"frames": 8, "frame_positions": 576}
    assert num_tokens({"type": "mlp", "time": "mean", **shared}, 8 * 576) == 576  # Uni-MoE's
    assert num_tokens({"type": "pooled_mlp", "pool": 4, "time": "keep", **shared}, 5 * 576) == 5 * 16
    assert num_tokens({"type": "qformer", "num_queries": 9, "time": "keep", **shared}, 2 * 576) == 18


def test_a_connector_over_time_needs_the_encoders_sizes():
    with pytest.raises(UserError, match="time needs frames and frame_positions"):
        build_connector({"type": "mlp", "time": "keep"}, 8, 16)
    with pytest.raises(UserError, match="7 frames, but the connector has 6 positions"):
        connector("keep")(torch.randn(1, 7 * 4, 8))
