import io

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

from unimoe.continual.learner import AdapterConfig
from unimoe.continual.run import ModelConfig, build_learner
from unimoe.data import Collator, FeatureCache, Sample
from unimoe.errors import UserError
from unimoe.inference.generate import generate
from unimoe.model.build import build_model
from unimoe.model.configuration import UniMoeConfig
from unimoe.model.host_loss import answer_loss
from unimoe.model.loading import load_model
from unimoe.model.modeling import UniMoeForConditionalGeneration
from unimoe.model.rope_3d import Span, TimeRotary, time_ids, time_positions
from unimoe.serve.batch import Prompt, RunningBatch
from unimoe.stages.module import StageModule
from unimoe.stages.trainable import Trainable
from unimoe.testing import IMAGE, SPEECH, VIDEO, save_tiny_llm


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


# -------------------------------------------------------------------- by the processor, to the model


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return str(save_tiny_llm(tmp_path_factory.mktemp("llm")))


@pytest.fixture(scope="module")
def clocked(llm):
    """A tiny model whose media have times, and its processor."""
    torch.manual_seed(0)
    return build_model(llm, {"image": IMAGE, "video": VIDEO, "speech": SPEECH}, rope_sections=[2, 1, 1])


def text(words):
    return {"type": "text", "text": words}


def sound(seconds):
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(0).normal(0, 0.1, int(16000 * seconds)), 16000, format="wav")
    return {"type": "speech", "bytes": file.getvalue()}


def picture():
    file = io.BytesIO()
    Image.new("RGB", (50, 40), "blue").save(file, "png")
    return {"type": "image", "bytes": file.getvalue()}


def film(*seconds):
    frames = [Image.new("RGB", (20, 20), (90 * index, 0, 0)) for index in range(len(seconds))]
    for frame, second in zip(frames, seconds, strict=True):
        frame.info["seconds"] = second
    return {"type": "video", "video": frames}


ASKED = [
    [text("plain words")],
    [text("see"), picture(), film(0.0, 1.0, 4.5), sound(4.0), text("what?")],
    [sound(0.5), picture()],
]


def samples():
    answer = {"role": "assistant", "content": [text("so it is")]}
    return [Sample([{"role": "user", "content": parts}, answer], f"{i}") for i, parts in enumerate(ASKED)]


def conversations():
    return [[{"role": "user", "content": parts}] for parts in ASKED]


def test_the_processor_places_every_medium(clocked):
    _, processor = clocked
    row = processor.encode(conversations()[1])
    kinds = [processor.tokenizer.convert_tokens_to_ids(f"<{kind}>") for kind in ("image", "speech")]
    before, tokens = (row["input_ids"].index(kinds[0]), row["input_ids"].count(kinds[1]))
    after = len(row["input_ids"]) - before - 4 - 3 - tokens
    video = Span("video", 3, (1, 1), (0.0, 1.0, 4.5))
    media = [Span("image", 4, (2, 2)), video, Span("speech", tokens, seconds=(4.0,))]
    expected = time_positions([Span("text", before), *media, Span("text", after)], theta=2.0)
    found = torch.tensor(row["position_ids"]).T
    assert torch.equal(found[1:], expected) and found[0].tolist() == list(range(found.shape[1]))


def test_words_alone_are_as_without_a_clock(clocked, llm):
    model, processor = clocked
    plain, without = build_model(llm)
    inputs = processor.apply_chat_template(conversations()[:1], tokenize=True)
    assert (inputs["position_ids"] == torch.arange(inputs["input_ids"].shape[1])).all()
    assert "position_ids" not in without.apply_chat_template(conversations()[:1], tokenize=True)
    with torch.no_grad():
        found = model(**inputs).logits
        del inputs["position_ids"]
        torch.testing.assert_close(found, plain(**inputs).logits)


def test_answers_in_a_batch_are_those_alone_and_those_of_the_server(clocked):
    model, processor = clocked
    batch = processor.apply_chat_template(conversations(), tokenize=True, add_generation_prompt=True)
    together = generate(model, processor, batch, 6)
    running, said = RunningBatch(model), []
    for row, asked in enumerate(conversations()):
        alone = processor.apply_chat_template([asked], tokenize=True, add_generation_prompt=True)
        assert generate(model, processor, alone, 6) == [together[row]]
        with torch.inference_mode():
            prompt = Prompt(model, alone)
            assert prompt.advance(3)[1] is None  # in pieces
            said.append([int(prompt.advance(10_000)[1].argmax())])
        running.join(prompt)
    with torch.inference_mode():
        for _ in range(5):
            for tokens, logits in zip(said, running.step([tokens[-1] for tokens in said]), strict=True):
                tokens.append(int(logits.argmax()))
    ends = model.generation_config.eos_token_id
    for tokens, answer in zip(said, together, strict=True):
        upto = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
        assert processor.tokenizer.decode(tokens[:upto], skip_special_tokens=True).strip() == answer


def test_a_cached_step_is_the_full_forward(clocked):
    model, processor = clocked
    inputs = processor.apply_chat_template(conversations()[1:2], tokenize=True, add_generation_prompt=True)
    settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    made = model.generate(**inputs, max_new_tokens=4, **settings)
    length = made.sequences.shape[1]
    more = torch.arange(1, length - inputs["input_ids"].shape[1] + 1) + inputs["position_ids"][..., -1:]
    whole = {**inputs, "input_ids": made.sequences, "attention_mask": torch.ones(1, length)}
    whole["position_ids"] = torch.cat([inputs["position_ids"], more], dim=-1)
    with torch.no_grad():
        logits = model(**whole).logits[0]
    for step, found in enumerate(made.logits):
        expected = logits[length - len(made.logits) + step - 1]
        torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=1e-4)


def test_packed_rows_and_stored_features_train_like_the_padded_batch(clocked, tmp_path):
    model, processor = clocked
    model.model.encoders.requires_grad_(False)
    towers = {kind: model.model.encoders[kind] for kind in ("image", "speech")}
    whole = Collator(processor)
    cached = FeatureCache(tmp_path, processor, towers)
    rows = samples()
    cached.fill(rows)
    ways = {
        "padded": [whole(rows)],
        "packed": whole.packed(rows, 1000),
        "stored": [Collator(processor, features=cached)(rows)],
    }
    assert len(ways["packed"]) == 1 and ways["packed"][0]["position_ids"].shape[:2] == (4, 1)
    found = {}
    for name, parts in ways.items():
        model.zero_grad()
        loss, _ = answer_loss(model, parts)
        loss.backward()
        grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        found[name] = loss.detach(), grads
    for name in ("packed", "stored"):
        torch.testing.assert_close(found[name][0], found["padded"][0], atol=1e-5, rtol=1e-5)
        for key, grad in found[name][1].items():
            torch.testing.assert_close(grad, found["padded"][1][key], atol=1e-5, rtol=1e-4, msg=key)
    with pytest.raises(UserError, match="cached features of videos have no times"):
        Collator(processor, features=FeatureCache(tmp_path, processor, dict(model.model.encoders)))


def test_a_step_against_the_loss_lowers_it_and_a_saved_model_keeps_its_clock(clocked, tmp_path):
    model, processor = clocked
    batch = Collator(processor)(samples())
    optimizer = torch.optim.SGD(model.model.language_model.parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        loss, _ = answer_loss(model, [batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, again = load_model(tmp_path, device="cpu")
    batch = again.apply_chat_template(conversations(), tokenize=True)
    assert again.rope_rate == 2.0 and loaded.config.rope_sections == [2, 1, 1]
    with torch.no_grad():
        logits = model(**batch).logits
        torch.testing.assert_close(loaded(**batch).logits, logits)
        del batch["position_ids"]
        assert (model(**batch).logits - logits).abs().max() > 1e-3  # the clock makes a difference
    # by default a continual run encodes such videos anew: cached features have no times
    learner = build_learner(ModelConfig(init_from=str(tmp_path)), AdapterConfig(), tmp_path / "features")
    assert learner.features is None


def test_a_stage_starts_a_model_with_a_clock(llm):
    trains = [Trainable("model.connectors.*", 1e-3)]
    stage = StageModule(llm=llm, modalities={"image": IMAGE}, rope_sections=[2, 1, 1], trainable=trains)
    stage.configure_model()
    assert stage.model.config.rope_sections == [2, 1, 1] and stage.processor.rope_rate == 2.0
    with pytest.raises(UserError, match="model.rope_sections belongs to a fresh start"):
        StageModule(init_from="a", rope_sections=[2, 1, 1])
