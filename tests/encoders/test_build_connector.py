import pytest
import torch

from unimoe.encoders import build_connector, copy_connector, fill_connector
from unimoe.errors import UserError

MLP = {"type": "mlp"}


def test_frames_take_the_weights_of_an_image_connector():
    image = build_connector(MLP, 8, 16)
    video = build_connector({**MLP, "time": "mean", "frames": 2, "frame_positions": 4}, 8, 16)
    copy_connector(video, image)
    features = torch.randn(1, 4, 8)
    with torch.no_grad():
        torch.testing.assert_close(video(features)[0], image(features)[0])


def test_connectors_of_other_shapes_are_refused():
    with pytest.raises(UserError, match="connector mlp: weights have shapes"):
        copy_connector(build_connector(MLP, 8, 16), build_connector(MLP, 8, 32))
    with pytest.raises(UserError, match="weights belong to a causal qformer"):
        fill_connector(build_connector(MLP, 8, 16), "whisper")
