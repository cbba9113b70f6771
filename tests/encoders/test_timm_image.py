from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from unimoe.encoders import build_encoder, load_encoder
from unimoe.errors import UserError


def saved(tmp_path, model, name="model.safetensors"):
    save_file(model.state_dict(), tmp_path / name)
    return tmp_path


def test_classifier_checkpoint_gives_timms_own_features(tmp_path):
    model: Any = timm.create_model("test_efficientnet", num_classes=7).eval()
    folder = saved(tmp_path, model)
    pixels = torch.randn(2, 3, 96, 96)
    for weights in (folder, folder / "model.safetensors"):
        encoder: Any = load_encoder(
            {"type": "timm", "name": "test_efficientnet", "image_size": 96}, weights
        ).eval()
        expected = model.forward_features(pixels).flatten(2).transpose(1, 2)
        assert torch.equal(encoder(pixels)[0], expected)
        assert encoder.grid == (3, 3) and encoder.num_tokens == 9


def test_prefix_tokens_are_dropped(tmp_path):
    model: Any = timm.create_model("test_vit", img_size=64).eval()
    encoder: Any = load_encoder(
        {"type": "timm", "name": "test_vit", "image_size": 64}, saved(tmp_path, model)
    ).eval()
    pixels = torch.randn(2, 3, 64, 64)
    assert model.num_prefix_tokens == 1
    assert torch.equal(encoder(pixels)[0], model.forward_features(pixels)[:, 1:])


def test_chosen_level_is_that_of_the_whole_model(tmp_path):
    model: Any = timm.create_model("test_efficientnet").eval()
    folder = saved(tmp_path, model)
    pixels = torch.randn(1, 3, 64, 64)
    levels = model.forward_intermediates(pixels, intermediates_only=True)
    for layer in (0, 2, -2, -1):
        config = {"type": "timm", "name": "test_efficientnet", "image_size": 64, "features_layer": layer}
        encoder: Any = load_encoder(config, folder).eval()
        assert torch.equal(encoder(pixels)[0], levels[layer].flatten(2).transpose(1, 2))


def test_position_table_of_another_size_is_resampled(tmp_path):
    folder = saved(tmp_path, timm.create_model("test_vit", img_size=160))
    encoder: Any = load_encoder({"type": "timm", "name": "test_vit", "image_size": 64}, folder)
    assert encoder.grid == (4, 4)


@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [
        ("tf_efficientnet_lite0", 160, (5, 5)),
        ("swin_tiny_patch4_window7_224", 224, (7, 7)),
        ("xcit_nano_12_p16_224", 224, (14, 14)),
    ],
)
def test_layouts_of_other_families(name, size, grid):
    with torch.device("meta"):
        encoder = build_encoder({"type": "timm", "name": name, "image_size": size})
        assert encoder.grid == grid
        assert encoder.eval()(torch.empty(2, 3, size, size))[0].shape == (
            2,
            grid[0] * grid[1],
            encoder.hidden_size,
        )


def test_preprocessing_is_timms_unless_set():
    config = {"type": "timm", "name": "tf_efficientnet_lite0", "image_size": 160}
    with torch.device("meta"):
        own: Any = build_encoder(config)
        other: Any = build_encoder({**config, "mean": [0.1, 0.2, 0.3], "interpolation": "bilinear"})
    own, other = own.preprocessing, other.preprocessing
    assert own == {"image_size": 160, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    assert other["mean"] == [0.1, 0.2, 0.3] and other["interpolation"] == "bilinear"


def test_unknown_name_offers_the_closest():
    with pytest.raises(UserError, match="no model 'tf_efficientnet_lit0'; closest: .*tf_efficientnet_lite0"):
        build_encoder({"type": "timm", "name": "tf_efficientnet_lit0"})


def test_level_out_of_range():
    with pytest.raises(UserError, match="test_vit: features_layer 99"):
        build_encoder({"type": "timm", "name": "test_vit", "features_layer": 99})


def test_weights_of_another_model(tmp_path):
    folder = saved(tmp_path, timm.create_model("test_vit2"))
    with pytest.raises(
        UserError, match=r"tensor 'pos_embed' has shape \[.*\], expected \[1, 101, 64\]|missing"
    ):
        load_encoder({"type": "timm", "name": "test_vit", "image_size": 160}, folder)


def test_timm_has_no_weights_of_that_name():
    with pytest.raises(UserError, match="timm: cannot have the weights of coatnet_pico_rw_224"):
        load_encoder({"type": "timm", "name": "coatnet_pico_rw_224"}, "pretrained")


@pytest.mark.weights
def test_the_embedded_tower(weights):
    config = {"type": "timm", "name": "tf_efficientnet_lite0", "image_size": 160}
    encoder: Any = load_encoder(config, weights / "efficientnet-lite0").eval()
    features_BSD = encoder(torch.zeros(1, 3, 160, 160))[0]
    assert features_BSD.shape == (1, 25, 1280) and bool(features_BSD.isfinite().all())
