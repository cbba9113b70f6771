import pytest
import torch

from unimoe.encoders import build_connector, num_tokens
from unimoe.errors import UserError

SIZES = {"frames": 6, "frame_positions": 4}


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
