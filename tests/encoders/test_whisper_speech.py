import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as nnf

from unimoe.encoders import build_encoder, load_encoder
from unimoe.errors import UserError

DIMS = {"n_mels": 80, "n_audio_ctx": 1500, "n_audio_state": 32, "n_audio_head": 4, "n_audio_layer": 2}
CONFIG = {"type": "whisper", "dims": DIMS}


def test_full_window_equals_openai_whisper():
    encoder: Any = build_encoder(CONFIG).eval()
    mel = torch.randn(2, 80, 3000)
    features_BSD, lengths_B = encoder(mel, torch.tensor([3000, 3000]))
    assert lengths_B.tolist() == [1500, 1500]
    torch.testing.assert_close(features_BSD, encoder.encoder(mel), atol=1e-5, rtol=0)


@pytest.mark.parametrize("padding", [0.0, 7.0])
def test_a_clip_in_a_padded_batch_equals_the_clip_alone(padding):
    """Odd lengths, and padding that is not silence (log-mel silence is not zero)."""
    encoder: Any = build_encoder(CONFIG).eval()
    frames = [301, 1, 2, 57, 120]
    clips = [torch.randn(80, count) for count in frames]
    batch = torch.stack([nnf.pad(clip, (0, 310 - clip.shape[1]), value=padding) for clip in clips])
    together, lengths_B = encoder(batch, torch.tensor(frames))
    assert lengths_B.tolist() == [151, 1, 1, 29, 60] and together.shape[1] == 151
    for row, clip in enumerate(clips):
        alone, length = encoder(clip[None], torch.tensor([clip.shape[1]]))
        torch.testing.assert_close(together[row, : length[0]], alone[0], atol=1e-5, rtol=0)
        assert not together[row, length[0] :].any()


def test_cost_follows_the_longest_clip_of_the_batch():
    encoder: Any = build_encoder(CONFIG).eval()
    seen = []
    for convolution in (encoder.encoder.conv1, encoder.encoder.conv2):
        convolution.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[2]))
    for block in encoder.encoder.blocks:
        block.attn.query.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    encoder(torch.randn(2, 80, 3000), torch.tensor([200, 90]))
    assert seen == [200, 200, 100, 100]


def test_gradients_reach_the_input_and_are_finite():
    encoder: Any = build_encoder(CONFIG)
    mel = torch.randn(2, 80, 40, requires_grad=True)
    features_BSD, _ = encoder(mel, torch.tensor([40, 10]))
    features_BSD.square().sum().backward()
    assert mel.grad is not None and bool(mel.grad.isfinite().all())
    assert not mel.grad[1, :, 10:].any()


@pytest.mark.parametrize("beside", [True, False])
def test_weights_bring_their_dims(tmp_path, beside):
    """A folder as ``unimoe prepare`` makes it, and openai-whisper's own file."""
    source = build_encoder(CONFIG).eval()
    state = {"encoder." + key: value for key, value in source.tower.state_dict().items()}
    state["decoder.ln.weight"] = torch.ones(32)
    if beside:
        save_file(state, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"type": "whisper", "dims": {**DIMS, "n_vocab": 9}}))
        weights = tmp_path
    else:
        weights = tmp_path / "tiny.pt"
        torch.save({"dims": DIMS, "model_state_dict": state}, weights)
    encoder = load_encoder({"type": "whisper"}, weights).eval()
    mel, frames_B = torch.randn(1, 80, 50), torch.tensor([50])
    assert torch.equal(encoder(mel, frames_B)[0], source(mel, frames_B)[0])


def test_errors(tmp_path):
    encoder: Any = build_encoder(CONFIG)
    with pytest.raises(UserError, match=r"shape \[1, 128, 40\], expected \[clips, 80, frames\]"):
        encoder(torch.randn(1, 128, 40), torch.tensor([40]))
    with pytest.raises(UserError, match="clips of 3 to 3200 mel frames, expected 1 to 3000"):
        encoder(torch.randn(2, 80, 3200), torch.tensor([3, 3200]))
    with pytest.raises(UserError, match="clips of 0 to 4 mel frames"):
        encoder(torch.randn(2, 80, 4), torch.tensor([0, 4]))
    with pytest.raises(UserError, match="dims lacks n_mels, n_audio_ctx"):
        build_encoder({"type": "whisper"})
    torch.save(
        {key: value for key, value in encoder.tower.state_dict().items() if "conv1" not in key},
        tmp_path / "w.pt",
    )
    with pytest.raises(UserError, match=r"2 of \d+ tensors are missing, first 'conv1.weight'"):
        load_encoder(CONFIG, tmp_path / "w.pt")


@pytest.mark.weights
def test_the_embedded_tower(weights):
    encoder: Any = load_encoder({"type": "whisper"}, weights / "whisper-tiny.en").eval()
    mel = torch.randn(1, 80, 3000) / 2
    with torch.no_grad():
        features_BSD, _ = encoder(mel, torch.tensor([3000]))
        torch.testing.assert_close(features_BSD, encoder.encoder(mel), atol=1e-5, rtol=1e-5)
