"""Reference numbers were made by torchaudio 2.11 (Kaldi's filter bank) and by speechbrain 1's port of the
official BEATs code, with the same inputs and weights."""

import math
from typing import Any

import pytest
import torch

from unimoe.encoders import build_encoder, load_encoder
from unimoe.encoders.beats import BeatsEncoder, fbank
from unimoe.errors import UserError

WIDTH, HEADS, LAYERS = 24, 2, 3
CFG = {
    "embed_dim": 16,
    "encoder_layers": LAYERS,
    "encoder_embed_dim": WIDTH,
    "encoder_ffn_embed_dim": 40,
    "encoder_attention_heads": HEADS,
    "conv_pos": 8,
    "conv_pos_groups": 4,
    "num_buckets": 32,
    "max_distance": 40,
    "deep_norm": True,
}
OFFICIAL = {
    "input_patch_size": 16,
    "relative_position_embedding": True,
    "gru_rel_pos": True,
    "layer_norm_first": False,
    "activation_fn": "gelu",
    "dropout": 0.0,
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of an official checkpoint of these sizes, in order."""
    found: dict[str, tuple[int, ...]] = {
        "post_extract_proj.weight": (WIDTH, 16),
        "post_extract_proj.bias": (WIDTH,),
        "patch_embedding.weight": (16, 1, 16, 16),
        "encoder.pos_conv.0.bias": (WIDTH,),
        "encoder.pos_conv.0.weight_g": (1, 1, 8),
        "encoder.pos_conv.0.weight_v": (WIDTH, WIDTH // 4, 8),
    }
    for index in range(LAYERS):
        layer = f"encoder.layers.{index}"
        found[f"{layer}.self_attn.grep_a"] = (1, HEADS, 1, 1)
        found[f"{layer}.self_attn.relative_attention_bias.weight"] = (32, HEADS)
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            found[f"{layer}.self_attn.{name}.weight"] = (WIDTH, WIDTH)
            found[f"{layer}.self_attn.{name}.bias"] = (WIDTH,)
        found[f"{layer}.self_attn.grep_linear.weight"] = (8, WIDTH // HEADS)
        found[f"{layer}.self_attn.grep_linear.bias"] = (8,)
        found[f"{layer}.fc1.weight"], found[f"{layer}.fc1.bias"] = (40, WIDTH), (40,)
        found[f"{layer}.fc2.weight"], found[f"{layer}.fc2.bias"] = (WIDTH, 40), (WIDTH,)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            found[f"{layer}.{name}.weight"] = found[f"{layer}.{name}.bias"] = (WIDTH,)
    found["encoder.layer_norm.weight"] = found["encoder.layer_norm.bias"] = (WIDTH,)
    found["layer_norm.weight"] = found["layer_norm.bias"] = (16,)
    return found


def official_tensors() -> dict[str, torch.Tensor]:
    tensors = {}
    for index, (name, shape) in enumerate(shapes().items()):
        wave = torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * (index + 1)).float()
        tensors[name] = wave.reshape(shape) * (0.1 if "patch" in name else 0.3) + ("norm.weight" in name)
        if "relative_attention_bias" in name:  # one table, that all layers share
            tensors[name] = tensors["encoder.layers.0.self_attn.relative_attention_bias.weight"]
    return tensors


def checkpoint(path: Any, **changes: Any) -> str:
    torch.save({"cfg": {**CFG, **OFFICIAL, **changes}, "model": official_tensors()}, path)
    return str(path)


def chirp(seconds: float) -> torch.Tensor:
    time = torch.arange(int(16000 * seconds)) / 16000
    return 0.3 * torch.sin(880 * math.pi * time * (1 + time)) + 0.05 * torch.cos(6000 * math.pi * time) + 0.1


def test_filter_bank_equals_kaldis():
    """Log mel energies of three frames before normalisation, by torchaudio."""
    bins = [0, 1, 17, 64, 100, 127]
    by_torchaudio = [
        [12.2285, 6.3915, 14.6881, 1.5997, 3.4511, -1.2929],
        [13.4251, 6.7143, 13.2694, 2.8518, 3.4441, 0.0867],
        [13.0984, 6.8935, 11.1814, 3.6557, 3.4804, 0.9362],
    ]
    features = fbank(chirp(2)[:800])
    assert features.shape == (128, 3)
    found = features.T[:, bins] * (2 * 6.55582) + 15.41663
    torch.testing.assert_close(found, torch.tensor(by_torchaudio), atol=2e-3, rtol=0)


def test_thirty_seconds_give_1496_positions():
    features = fbank(torch.zeros(30 * 16000))
    assert features.shape == (128, 2998)
    assert BeatsEncoder.num_tokens(2998) == 1496


def test_official_weights_give_official_features(tmp_path):
    """Features of one second, by speechbrain's port."""
    encoder = load_encoder({"type": "beats"}, checkpoint(tmp_path / "beats.pt")).eval()
    assert {key: encoder.config[key] for key in CFG} == CFG
    with torch.no_grad():
        features, lengths = encoder(fbank(chirp(1))[None], torch.tensor([98]))
    assert features.shape == (1, 48, WIDTH) and lengths.tolist() == [48]
    by_speechbrain = [[1.0214, 0.9081, -0.008], [0.7159, 0.9333, 0.1916], [0.7676, 1.2027, 0.51]]
    found = features[0, [0, 11, 47]][:, [0, 7, 23]]
    torch.testing.assert_close(found, torch.tensor(by_speechbrain), atol=1e-3, rtol=0)


def test_a_window_does_not_depend_on_its_batch_mates(tmp_path):
    encoder = load_encoder({"type": "beats"}, checkpoint(tmp_path / "beats.pt")).eval()
    long, short = fbank(chirp(1)), fbank(chirp(0.5))
    padded = torch.full_like(long, 9.0)
    padded[:, : short.shape[1]] = short
    frames = torch.tensor([long.shape[1], short.shape[1]])
    with torch.no_grad():
        features, lengths = encoder(torch.stack([long, padded]), frames)
        alone, _ = encoder(short[None], frames[1:])
    torch.testing.assert_close(features[1, : lengths[1]], alone[0], atol=1e-5, rtol=1e-5)
    assert not features[1, lengths[1] :].any()


def test_published_sizes():
    with torch.device("meta"):
        encoder = build_encoder({"type": "beats"})
    assert (encoder.hidden_size, encoder.modality) == (768, "audio")
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 1) == 90.3


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cfg.layer_norm_first is True, expected False"):
        load_encoder({"type": "beats"}, checkpoint(tmp_path / "a.pt", layer_norm_first=True))
    encoder: Any = build_encoder({"type": "beats", **CFG})
    with pytest.raises(UserError, match=r"windows of 10 to 10 frames, expected 16"):
        encoder(torch.zeros(1, 128, 10), torch.tensor([10]))
    with pytest.raises(UserError, match=r"expected \[windows, 128, frames\]"):
        encoder(torch.zeros(1, 80, 32), torch.tensor([32]))
    with pytest.raises(UserError, match="at least 400"):
        fbank(torch.zeros(399))


def test_a_pickle_with_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"cfg": Evil(), "model": official_tensors()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="cannot be read as weights"):
        load_encoder({"type": "beats"}, tmp_path / "evil.pt")
