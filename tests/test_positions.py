import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

from unimoe.configuration import UniMoeConfig
from unimoe.errors import UserError
from unimoe.modeling import UniMoeForConditionalGeneration
from unimoe.positions import Span, TimeRotary, time_ids, time_positions


def test_text_is_a_sequence_and_an_image_a_grid_at_one_time():
    ids = time_positions([Span("text", 2), Span("image", 6, (2, 3)), Span("text", 1)], theta=2)
    assert ids.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]


def test_frames_are_placed_by_their_seconds():
    ids = time_positions([Span("text", 1), Span("video", 4, (1, 2), (0.0, 2.5)), Span("text", 1)], theta=2)
    assert ids[0].tolist() == [0, 1, 1, 6, 6, 7]
    assert ids[1].tolist() == [0, 1, 1, 1, 1, 7]
    assert ids[2].tolist() == [0, 1, 2, 1, 2, 7]


def test_sound_advances_by_three_seconds_at_a_time():
    """200 tokens of 30 s: 20 share an id (Uni-MoE-2.0-Omni)."""
    ids = time_positions([Span("text", 4), Span("speech", 200, seconds=(30.0,))], theta=2)
    assert (ids[0] == ids[1]).all() and (ids[0] == ids[2]).all()
    assert ids[0, 4:].reshape(10, 20).tolist() == [[4 + 6 * block] * 20 for block in range(10)]


def test_a_clips_sound_and_frames_share_a_clock():
    video = Span("video", 4, (1, 1), (0.0, 3.0, 6.0, 9.0))
    sound = Span("audio", 40, seconds=(12.0,), with_previous=True)
    ids = time_positions([Span("text", 3), video, sound, Span("text", 1)], theta=5)
    frames, tokens = ids[0, 3:7], ids[0, 7:47].reshape(4, 10)
    assert (tokens == frames[:, None]).all()
    assert ids[:, -1].tolist() == [49, 49, 49]  # behind both


def test_mistakes_name_the_span():
    with pytest.raises(UserError, match=r"span 1 \(image\): 5 tokens, expected 1 frames of 2 x 3"):
        time_positions([Span("text", 1), Span("image", 5, (2, 3))], theta=1)
    with pytest.raises(UserError, match=r"span 0 \(audio\): seconds are \[\]"):
        time_positions([Span("audio", 5)], theta=1)
    with pytest.raises(UserError, match=r"have 5 frequencies, expected 8"):
        TimeRotary(torch.nn.Identity(), [1, 2, 2], 8)


def test_rotary_equals_qwens():
    sections = [2, 3, 3]
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "rope_parameters": None}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    theirs = Qwen2_5_VLRotaryEmbedding(
        Qwen2_5_VLTextConfig(**{**sizes, "rope_parameters": {**rope, "mrope_section": sections}})
    )
    ours = TimeRotary(LlamaRotaryEmbedding(LlamaConfig(**{**sizes, "rope_parameters": rope})), sections, 8)
    ids = torch.randint(0, 100, (3, 2, 7))
    x = torch.randn(2, 7, 32)
    with time_ids(ids):
        found = ours(x, ids[0])
    for one, other in zip(found, theirs(x, ids), strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(ours(x, ids[0]), ours.inner(x, ids[0]), strict=True):
        assert torch.equal(one, other)


def test_the_model_takes_three_axes(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = LlamaConfig(vocab_size=50, initializer_range=0.3, **sizes)
    torch.manual_seed(0)
    model = UniMoeForConditionalGeneration(UniMoeConfig(text_config=text, rope_sections=[2, 3, 3])).eval()
    ids = torch.randint(0, 50, (1, 9))
    plain = model(input_ids=ids).logits
    sequence = time_positions([Span("text", 9)], theta=1)
    torch.testing.assert_close(model(input_ids=ids, position_ids=sequence[:, None]).logits, plain)
    picture = time_positions([Span("text", 2), Span("image", 6, (2, 3)), Span("text", 1)], theta=1)
    other = model(input_ids=ids, position_ids=picture[:, None]).logits
    torch.testing.assert_close(other[:, :2], plain[:, :2])
    assert not torch.allclose(other[:, 3:], plain[:, 3:], atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = UniMoeForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(input_ids=ids, position_ids=picture[:, None]).logits, other)
    model.config.rope_sections = None
    with pytest.raises(ValueError, match="rope_sections"):
        model(input_ids=ids, position_ids=picture[:, None])
