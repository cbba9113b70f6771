import json
from typing import Any

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from unimoe.encoders import build_encoder, load_encoder
from unimoe.errors import UserError

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
SMALL: dict[str, Any] = {**TINY, "image_size": 32, "patch_size": 8}


def stock(kind) -> Any:
    if kind == "clip":
        return CLIPVisionModel(CLIPVisionConfig(**SMALL)).eval()
    return SiglipVisionModel(SiglipVisionConfig(**SMALL)).eval()


def test_336_pixels_in_patches_of_14_are_576_tokens():
    with torch.device("meta"):
        encoder: Any = build_encoder(
            {"type": "clip", "config": {**TINY, "image_size": 336, "patch_size": 14}}
        )
        assert encoder.grid == (24, 24)
        assert encoder(torch.empty(1, 3, 336, 336))[0].shape == (1, 576, 16)


@pytest.mark.parametrize("layer", [-2, -1, 0, 1, 3])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_features_are_the_hidden_states(tmp_path, kind, layer):
    model = stock(kind)
    model.save_pretrained(tmp_path)
    encoder: Any = load_encoder({"type": kind, "features_layer": layer}, tmp_path).eval()
    pixels = torch.randn(2, 3, 32, 32)
    hidden = model(pixels, output_hidden_states=True).hidden_states
    expected = hidden[layer][:, 1:] if kind == "clip" else hidden[layer]
    torch.testing.assert_close(encoder(pixels)[0], expected, atol=1e-6, rtol=0)


def test_layers_that_are_not_read_are_not_built():
    count = {}
    for layer in (None, -1, -2, 1, 0):
        encoder: Any = build_encoder({"type": "clip", "config": SMALL, "features_layer": layer})
        count[layer] = len(encoder.body.encoder.layers)
    assert count == {None: 3, -1: 3, -2: 2, 1: 1, 0: 0}
    assert build_encoder({"type": "clip", "config": SMALL}).config["features_layer"] == -2


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_none_is_the_last_layer_after_the_final_norm(tmp_path, kind):
    model = stock(kind)
    model.save_pretrained(tmp_path)
    encoder: Any = load_encoder({"type": kind, "features_layer": None}, tmp_path).eval()
    pixels = torch.randn(1, 3, 32, 32)
    last = model(pixels, output_hidden_states=True).last_hidden_state
    body = getattr(model, "vision_model", model)
    expected = body.post_layernorm(last[:, 1:]) if kind == "clip" else last
    torch.testing.assert_close(encoder(pixels)[0], expected, atol=1e-6, rtol=0)


def test_whole_clip_folder_with_its_preprocessing(tmp_path):
    text = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 9,
    }
    model: Any = CLIPModel(CLIPConfig(vision_config=SMALL, text_config=text, projection_dim=4)).eval()
    model.save_pretrained(tmp_path)
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5], "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    encoder: Any = load_encoder({"type": "clip"}, tmp_path).eval()
    assert encoder.preprocessing == {
        "image_size": 32, "mean": [0.1, 0.2, 0.3], "std": [0.5] * 3, "interpolation": "bilinear",
        "fit": "stretch",
    }  # fmt: skip
    pixels = torch.randn(1, 3, 32, 32)
    hidden = model.vision_model(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(encoder(pixels)[0], hidden[-2][:, 1:], atol=1e-6, rtol=0)


def test_layer_out_of_range():
    with pytest.raises(UserError, match="features_layer is 4, expected -4 to 3"):
        build_encoder({"type": "clip", "config": SMALL, "features_layer": 4})


def test_missing_weights(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="/nowhere/clip"):
        load_encoder({"type": "clip", "config": SMALL}, "/nowhere/clip")
