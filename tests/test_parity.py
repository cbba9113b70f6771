"""The parity checklist of Uni-MoE (arXiv 2405.11273 and its public code): what holds, and where.

fact                                                        test
336 x 336 picture: 576 tokens, CLIP layer -2 without CLS    test_published.py, test_convert.py (same logits)
1024 -> 4096 -> 4096 with GELU                              test_published.py, test_convert.py
8 frames: 576 tokens                                        test_tokens_of_pictures_and_frames, below
30 s: 50 tokens; 31 s: 100; 65 s: 150                       test_tokens_of_sounds, below
BEATs: mean, deviation, divisor; 30 s: 1496 of 768          test_beats.py
Whisper-small: 80 mel bins, 1500 x 768                      test_published.py
Whisper's decoder as Q-Former                               test_whisper_qformer.py
router without bias; weights sum to 1 (code), < 1 (paper)   test_both_gating_orders, below
balance loss is 1 a layer at uniform routing                tests/moe/test_losses.py
identical experts equal the dense model in "code" mode      test_identical_experts_are_the_dense_model, below
labels only on what the assistant said                      tests/data/test_collate.py

What deviates: placeholders are tokens of the vocabulary, one for each modality, not -200, -300 and -400
(speech and audio have their own, and generation never makes one); -100 marks what is not learned, as there.
The last window of a sound is as long as the sound, not padded to 30 s. Images stay where they stand in their
turn. Video has a connector of its own, that starts as the one of pictures. Balance loss is off for 4
specialised experts and on for 8, as there.
"""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from unimoe.encoders import num_tokens
from unimoe.model.configuration import IGNORED
from unimoe.moe import Context, MoEConfig, MoELayer, TopK, install_moe
from unimoe.testing import BEATS, SPEECH, tiny_model

QFORMER = {"type": "qformer", "num_queries": 50, "num_layers": 1, "num_heads": 2, "hidden_size": 16}


@pytest.fixture(scope="module")
def hearing(tmp_path_factory) -> Any:
    """A tiny model with a speech and a sound tower, each before 50 queries."""
    return tiny_model(
        tmp_path_factory.mktemp("hearing"),
        speech={"encoder": SPEECH["encoder"], "connector": {**QFORMER, "causal": True}},
        audio={"encoder": BEATS["encoder"], "connector": QFORMER},
    )


@pytest.mark.parametrize("kind", ["speech", "audio"])
@pytest.mark.parametrize(("seconds", "tokens"), [(2, 50), (30, 50), (31, 100), (65, 150)])
def test_tokens_of_sounds(hearing, kind, seconds, tokens):
    _, processor = hearing
    part = {"type": kind, kind: np.zeros(16000 * seconds, np.float32)}
    prepared = processor.preprocessors[kind](part, "test")
    assert prepared.tokens == tokens
    assert len(prepared.inputs[f"{kind}_features"]) == tokens // 50


def test_tokens_of_pictures_and_frames():
    projector = {"type": "mlp", "depth": 2}
    over_time = {**projector, "time": "mean", "frames": 8, "frame_positions": 576}
    assert num_tokens(projector, 576) == num_tokens(over_time, 8 * 576) == 576


def test_speech_and_sound_in_one_sample(hearing):
    model, processor = hearing
    sound = np.random.default_rng(0).normal(size=8000).astype(np.float32)
    content = [
        {"type": "audio", "audio": sound},
        {"type": "speech", "speech": sound},
        {"type": "text", "text": "?"},
    ]
    turn = {"role": "user", "content": content}
    batch = processor.pad([processor.encode([turn])])
    with torch.no_grad():
        logits = model(**batch).logits
        batch["audio_features"] = batch["audio_features"] + 1
        other = model(**batch).logits
    assert (batch["input_ids"] == model.config.audio_token_id).sum() == 50
    assert (batch["input_ids"] == model.config.speech_token_id).sum() == 50
    assert not torch.allclose(logits[:, -1], other[:, -1])


def test_both_gating_orders():
    x = torch.randn(9, 8)
    code, paper = TopK(8, 4, 2), TopK(8, 4, 2, "softmax_topk", renormalize=False)
    for router, whole in ((code, True), (paper, False)):
        assert [name for name, _ in router.named_parameters()] == ["weight"]
        routing = router(x, Context())
        sums = torch.zeros(9).index_add(0, routing.token_N, routing.weight_N)
        assert torch.allclose(sums, torch.ones(9)) if whole else bool((sums < 1).all())


@pytest.mark.parametrize("placement", ["all", "interval", "first_half", "second_half"])
def test_identical_experts_are_the_dense_model(placement):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    decoder = LlamaModel(LlamaConfig(vocab_size=50, **sizes)).eval()
    ids = torch.randint(0, 50, (2, 7))
    dense = decoder(ids).last_hidden_state
    install_moe(decoder, MoEConfig(router={"k": 2, "init_std": 1.0}, placement=placement))
    assert sum(isinstance(layer.mlp, MoELayer) for layer in decoder.layers) == (
        4 if placement == "all" else 2
    )
    torch.testing.assert_close(decoder(ids).last_hidden_state, dense, atol=1e-5, rtol=1e-5)


def test_placeholders_are_tokens_of_their_own(hearing):
    model, _ = hearing
    ids = model.config.token_ids()
    assert ids["speech"] != ids["audio"] and all(
        0 <= i < model.config.text_config.vocab_size for i in ids.values()
    )
    assert set(ids.values()) <= set(model.generation_config.suppress_tokens)
    assert IGNORED == -100
