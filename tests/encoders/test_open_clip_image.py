import json
from typing import Any

import pytest
import torch
from open_clip.constants import OPENAI_DATASET_MEAN
from open_clip.model import CLIP

from unimoe.encoders import build_encoder, load_encoder
from unimoe.errors import UserError

VISION = {"image_size": 32, "layers": 3, "width": 16, "head_width": 8, "patch_size": 8}
TEXT = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
MODEL = {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT}
CONFIG = {"type": "open_clip", "model_cfg": {"embed_dim": 8, "vision_cfg": VISION}}


@pytest.fixture
def clip():
    return CLIP(**MODEL).eval()


def expected(clip, pixels, layer):
    found = clip.visual.forward_intermediates(
        pixels,
        indices=[layer],
        intermediates_only=True,
        normalize_intermediates=layer == -1,
        output_fmt="NLC",
    )
    return found["image_intermediates"][0]


@pytest.mark.parametrize("layer", [None, -2, 0])
@pytest.mark.parametrize("wrapped", [False, True])
def test_local_checkpoint_of_the_whole_model(tmp_path, clip, layer, wrapped):
    state = clip.state_dict()
    if wrapped:  # as open_clip's trainer saves it under DDP
        state = {"epoch": 1, "state_dict": {"module." + key: value for key, value in state.items()}}
    torch.save(state, tmp_path / "clip.pt")
    encoder = load_encoder({**CONFIG, "features_layer": layer}, tmp_path / "clip.pt").eval()
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(encoder(pixels)[0], expected(clip, pixels, -1 if layer is None else layer))
    assert encoder.grid == (4, 4)
    assert not any("text" in key or key.split(".")[-1] == "proj" for key in encoder.state_dict())


def test_local_checkpoint_of_the_tower_alone(tmp_path, clip):
    torch.save(clip.visual.state_dict(), tmp_path / "tower.pt")
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(
        load_encoder(CONFIG, tmp_path / "tower.pt").eval()(pixels)[0], expected(clip, pixels, -1)
    )


def test_local_dir_describes_itself(tmp_path, clip):
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"}
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": MODEL, "preprocess_cfg": preprocess})
    )
    torch.save(clip.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    encoder = load_encoder({"type": "open_clip"}, f"local-dir:{tmp_path}").eval()
    assert encoder.preprocessing == {"image_size": 32, **preprocess}
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(encoder(pixels)[0], expected(clip, pixels, -1))
    again = build_encoder(encoder.config)
    assert again.preprocessing == encoder.preprocessing and "text_cfg" not in again.config["model_cfg"]


def test_another_image_size_resamples_positions(tmp_path, clip):
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    encoder = load_encoder({**CONFIG, "image_size": 64}, tmp_path / "clip.pt")
    assert encoder.grid == (8, 8)
    ours = encoder.state_dict()["visual.positional_embedding"]
    assert torch.equal(ours[0], clip.visual.positional_embedding[0])


def test_tag_brings_its_normalisation_and_activation(tmp_path, monkeypatch):
    """SigLIP-like tags have other means; OpenAI's need QuickGELU whatever the name says."""
    from unimoe.encoders import open_clip_image

    small = {"embed_dim": 8, "vision_cfg": VISION}
    monkeypatch.setattr(open_clip_image, "architecture", lambda name: small)
    state = CLIP(**MODEL, quick_gelu=True).state_dict()
    torch.save(state, tmp_path / "openai.pt")
    monkeypatch.setattr(open_clip_image, "download_pretrained", lambda tag: str(tmp_path / "openai.pt"))
    encoder: Any = load_encoder({"type": "open_clip", "name": "ViT-B-32"}, "openai")
    assert encoder.config["model_cfg"]["quick_gelu"] is True
    assert encoder.preprocessing["mean"] == list(OPENAI_DATASET_MEAN)


@pytest.mark.parametrize(
    ("name", "layer", "grid", "width"),
    [("RN50", None, (7, 7), 2048), ("RN50", -2, (14, 14), 1024), ("coca_ViT-B-32", None, (7, 7), 768),
     ("ViT-L-14-336", None, (24, 24), 1024), ("xlm-roberta-base-ViT-B-32", None, (7, 7), 768)],
)  # fmt: skip
def test_built_in_architectures(name, layer, grid, width):
    with torch.device("meta"):
        encoder = build_encoder({"type": "open_clip", "name": name, "features_layer": layer})
    assert (encoder.grid, encoder.hidden_size) == (grid, width)


def test_resnet_level_runs():
    config = {
        "type": "open_clip",
        "model_cfg": {"embed_dim": 8, "vision_cfg": {**VISION, "layers": [1, 1, 1, 1]}},
    }
    for layer, width in ((None, 512), (1, 64)):
        encoder = build_encoder({**config, "features_layer": layer}).eval()
        assert encoder(torch.randn(1, 3, 32, 32))[0].shape == (1, encoder.num_tokens, width)


def test_errors(tmp_path, clip):
    with pytest.raises(UserError, match="no model 'ViT-B32'; closest: .*ViT-B-32"):
        build_encoder({"type": "open_clip", "name": "ViT-B32"})
    with pytest.raises(UserError, match="neither a file nor an open_clip tag of ViT-B-32; tags: openai"):
        load_encoder({"type": "open_clip", "name": "ViT-B-32"}, tmp_path / "absent.pt")
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    wide = {**CONFIG, "model_cfg": {"embed_dim": 8, "vision_cfg": {**VISION, "width": 24}}}
    with pytest.raises(UserError, match=r"clip.pt: tensor '.*' has shape \[16.*\], expected \[24"):
        load_encoder(wide, tmp_path / "clip.pt")
    with pytest.raises(UserError, match="features_layer 3"):
        build_encoder({**CONFIG, "features_layer": 3})
    with pytest.raises(UserError, match=r"open_clip_config\.json"):
        load_encoder({"type": "open_clip"}, f"local-dir:{tmp_path}")
