"""Contract of every encoder type, on tiny random towers."""

import json

import pytest
import torch

from unimoe.encoders import ImageEncoder, SpeechEncoder, build_encoder, load_encoder
from unimoe.errors import UserError

VIT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
CONFIGS = {
    "timm-cnn": {"type": "timm", "name": "test_efficientnet", "image_size": 64},
    "timm-vit": {"type": "timm", "name": "test_vit", "image_size": 64},
    "timm-level": {"type": "timm", "name": "test_vit", "image_size": 64, "features_layer": -2},
    "timm-norm-after-pool": {"type": "timm", "name": "test_vit4", "image_size": 64},
    "timm-rotary": {"type": "timm", "name": "eva02_tiny_patch14_224", "image_size": 28},
    "open_clip": {
        "type": "open_clip",
        "model_cfg": {
            "embed_dim": 8,
            "vision_cfg": {"image_size": 32, "layers": 3, "width": 16, "head_width": 8, "patch_size": 8},
        },
    },
    "open_clip-timm": {
        "type": "open_clip",
        "model_cfg": {"embed_dim": 8, "vision_cfg": {"timm_model_name": "test_vit", "image_size": 64}},
    },
    "clip": {"type": "clip", "config": {**VIT, "image_size": 32, "patch_size": 8}},
    "siglip": {"type": "siglip", "config": {**VIT, "image_size": 32, "patch_size": 8}},
    "whisper": {
        "type": "whisper",
        "dims": {"n_mels": 8, "n_audio_ctx": 50, "n_audio_state": 16, "n_audio_head": 2, "n_audio_layer": 2},
    },
}
every = pytest.mark.parametrize("name", CONFIGS)


def inputs(encoder):
    if isinstance(encoder, ImageEncoder):
        size = encoder.preprocessing["image_size"]
        return (torch.randn(3, 3, size, size),)
    return torch.randn(3, encoder.num_mel_bins, 60), torch.tensor([60, 11, 34])


@every
def test_shapes_are_as_announced(name):
    encoder = build_encoder(CONFIGS[name]).eval()
    features_BSD, lengths_B = encoder(*inputs(encoder))
    assert encoder.hidden_size == features_BSD.shape[2]
    if isinstance(encoder, ImageEncoder):
        assert lengths_B is None and encoder.modality == "image"
        assert features_BSD.shape[:2] == (3, encoder.num_tokens)
        assert encoder.grid[0] * encoder.grid[1] == encoder.num_tokens
        assert set(encoder.preprocessing) - {"fit"} == {"image_size", "mean", "std", "interpolation"}
    else:
        assert encoder.modality == "speech" and isinstance(encoder, SpeechEncoder)
        assert lengths_B.tolist() == [30, 6, 17] == [encoder.num_tokens(frames) for frames in (60, 11, 34)]


@every
def test_config_survives_json_and_builds_the_same_structure(name):
    encoder = build_encoder(CONFIGS[name])
    again = build_encoder(json.loads(json.dumps(encoder.config)))
    assert again.config == encoder.config
    again.load_state_dict(encoder.state_dict())
    batch = inputs(encoder)
    assert torch.equal(encoder.eval()(*batch)[0], again.eval()(*batch)[0])


@every
def test_built_on_meta_then_filled_equals_the_original(name):
    encoder = build_encoder(CONFIGS[name]).eval()
    with torch.device("meta"):
        empty = build_encoder(CONFIGS[name]).eval()
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(encoder.state_dict(), assign=True)
    empty.reset_buffers()
    batch = inputs(encoder)
    assert torch.equal(encoder(*batch)[0], empty(*batch)[0])


@every
def test_reset_buffers_repairs_garbage(name):
    """transformers hands out uninitialised memory for what no checkpoint holds."""
    encoder = build_encoder(CONFIGS[name]).eval()
    batch = inputs(encoder)
    before = encoder(*batch)[0]
    saved = encoder.state_dict().keys()
    for key, buffer in encoder.named_buffers():
        if key not in saved:
            buffer.zero_()
    encoder.reset_buffers()
    assert torch.equal(encoder(*batch)[0], before)


@every
def test_batch_mates_do_not_matter(name):
    encoder = build_encoder(CONFIGS[name]).eval()
    batch = inputs(encoder)
    together, lengths_B = encoder(*batch)
    for item in range(3):
        alone = encoder(*(tensor[item : item + 1] for tensor in batch))[0][0]
        length = len(alone) if lengths_B is None else int(lengths_B[item])
        torch.testing.assert_close(together[item, :length], alone[:length], atol=1e-5, rtol=0)


@every
def test_every_parameter_is_used(name):
    """Nothing is built that the features do not pass through: a trained tower would hang under DDP."""
    encoder = build_encoder(CONFIGS[name]).train()
    encoder(*inputs(encoder))[0].square().sum().backward()
    assert [key for key, parameter in encoder.named_parameters() if parameter.grad is None] == []


@every
def test_half_precision_weights_take_float_inputs(name):
    encoder = build_encoder(CONFIGS[name]).eval().to(torch.bfloat16)
    features_BSD = encoder(*inputs(encoder))[0]
    assert features_BSD.dtype == torch.bfloat16 and bool(features_BSD.isfinite().all())


def test_random_weights_when_none_are_given():
    assert load_encoder(CONFIGS["timm-vit"]).config == build_encoder(CONFIGS["timm-vit"]).config


def test_unknown_type_lists_the_known():
    with pytest.raises(UserError, match=r"unknown encoder type 'resnet'; known: timm, open_clip, clip"):
        build_encoder({"type": "resnet"})


def test_unknown_and_missing_keys():
    with pytest.raises(UserError, match="unknown key 'size'; known: name, image_size"):
        build_encoder({"type": "timm", "name": "test_vit", "size": 64})
    with pytest.raises(UserError, match="the key 'name' is missing"):
        build_encoder({"type": "timm"})


def test_wrong_image_size_says_both():
    encoder = build_encoder(CONFIGS["timm-vit"])
    with pytest.raises(UserError, match=r"\[1, 3, 32, 32\], expected \[images, 3, 64, 64\]"):
        encoder(torch.randn(1, 3, 32, 32))
