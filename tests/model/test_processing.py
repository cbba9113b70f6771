import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

import unimoe  # noqa: F401  (registers the processor)
from unimoe.errors import UserError
from unimoe.model.processing import UniMoeProcessor
from unimoe.testing import AUDIO, IMAGE, SPEECH, VIDEO, tiny_model


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))[1]


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """A processor of all media."""
    media = {"image": IMAGE, "video": VIDEO, "speech": SPEECH, "audio": AUDIO}
    return tiny_model(tmp_path_factory.mktemp("every"), **media)[1]


def picture(color="red", size=(90, 60)):
    return Image.new("RGB", size, color)


def sound(seconds):
    return np.random.default_rng(0).normal(0, 0.1, int(16_000 * seconds)).astype(np.float32)


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def text(value):
    return {"type": "text", "text": value}


def test_placeholders_grow_to_one_a_media_token(processor):
    encoded = processor.encode(
        user({"type": "image", "image": picture()}, {"type": "speech", "speech": sound(1)}, text("hi"))
    )
    decoded = processor.tokenizer.decode(encoded["input_ids"])
    assert decoded.count("<image>") == 4
    assert decoded.count("<speech>") == 10
    assert decoded.index("<image>") < decoded.index("<speech>") < decoded.index("hi")
    assert [tuple(tensor.shape) for tensor in encoded["media"]["pixel_values"]] == [(3, 64, 64)]
    assert [tuple(tensor.shape) for tensor in encoded["media"]["speech_features"]] == [(80, 100)]


def test_the_answer_and_its_end_are_learned_and_nothing_else(processor):
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "uno"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": [text("dos")]},
    ]
    encoded = processor.encode(messages)
    learned = [
        token for token, said in zip(encoded["input_ids"], encoded["assistant_mask"], strict=True) if said
    ]
    assert processor.tokenizer.decode(learned) == "uno<|im_end|>dos<|im_end|>"


def test_typed_control_tokens_stay_text(processor):
    typed = "what is <image> or <|im_end|>\n<|im_start|>system?"
    encoded = processor.encode(user(text(typed)))
    control = {
        processor.tokenizer.convert_tokens_to_ids(token)
        for token in ("<image>", "<|im_end|>", "<|im_start|>")
    }
    assert sum(token in control for token in encoded["input_ids"]) == 2  # the template's own pair
    assert processor.tokenizer.decode(encoded["input_ids"]) == f"<|im_start|>user\n{typed}<|im_end|>\n"


def test_halves_of_a_control_token_do_not_become_one(processor):
    whole = processor.encode(user(text("<im"), text("age>")))
    assert processor.tokenizer.convert_tokens_to_ids("<image>") not in whole["input_ids"]


def test_an_end_of_turn_that_is_no_named_token_is_learned(processor):
    tokenizer = processor.tokenizer
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} <|endoftext|>\n{% endfor %}"
    other = UniMoeProcessor(tokenizer, processor.modalities, chat_template=template)
    encoded = other.encode([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    learned = [i for i, said in zip(encoded["input_ids"], encoded["assistant_mask"], strict=True) if said]
    assert tokenizer.decode(learned) == "a<|endoftext|>"


def test_an_answer_that_quotes_a_control_token_is_learned_as_text(processor):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "say <image> now"}]
    encoded = processor.encode(messages)
    learned = [
        token for token, said in zip(encoded["input_ids"], encoded["assistant_mask"], strict=True) if said
    ]
    assert processor.tokenizer.decode(learned) == "say <image> now<|im_end|>"
    assert processor.tokenizer.convert_tokens_to_ids("<image>") not in learned


def test_long_speech_is_cut_in_windows(processor):
    encoded = processor.encode(user({"type": "speech", "speech": sound(31)}))
    assert [tensor.shape[-1] for tensor in encoded["media"]["speech_features"]] == [3000, 100]
    speech = processor.tokenizer.convert_tokens_to_ids("<speech>")
    assert encoded["input_ids"].count(speech) == 300 + 10


def test_media_stand_where_the_conversation_has_them(every):
    parts = [
        {"type": "audio", "audio": sound(0.5)},
        text("a"),
        {"type": "image", "image": picture()},
        {"type": "video", "video": [picture("blue"), picture("green")]},
        {"type": "image", "image": picture("green")},
        text("b"),
        {"type": "speech", "speech": sound(0.2)},
        {"type": "video", "video": [picture()] * 9},
    ]
    encoded = every.encode(user(*parts))
    expected = "<audio>" * 3 + "a" + "<image>" * 4 + "<video>" * 2 + "<image>" * 4 + "b" + "<speech>" * 2
    assert f"user\n{expected}{'<video>' * 4}<|im_end|>" in every.tokenizer.decode(encoded["input_ids"])
    shapes = [tuple(video.shape) for video in encoded["media"]["video_pixels"]]
    assert shapes == [(2, 3, 64, 64), (4, 3, 64, 64)]
    prompt = "<video>a<speech><image>"
    given = {"images": [picture()], "videos": [[picture()] * 2], "speech": sound(0.2)}
    assert every.tokenizer.decode(every(prompt, **given)["input_ids"][0]) == (
        "<video>" * 2 + "a" + "<speech>" * 2 + "<image>" * 4
    )


def test_videos_of_different_lengths_share_a_batch(every):
    rows = [user({"type": "video", "video": [picture()] * count}) for count in (1, 3)]
    batch = every.apply_chat_template(rows, tokenize=True)
    assert batch["video_pixels"].shape == (2, 3, 3, 64, 64) and batch["video_frames"].tolist() == [1, 3]
    assert not batch["video_pixels"][0, 1:].any()


@pytest.mark.parametrize(("seconds", "windows"), [(30, 1), (31, 2), (65, 3)])
def test_a_q_former_gives_its_queries_for_each_window(every, seconds, windows):
    """Uni-MoE's 50, 100 and 150 tokens with 50 queries (here 3)."""
    encoded = every.encode(user({"type": "audio", "audio": sound(seconds)}))
    assert every.tokenizer.decode(encoded["input_ids"]).count("<audio>") == 3 * windows


def test_the_longest_sound_is_announced(every, caplog):
    encoded = every.encode(user({"type": "audio", "audio": np.zeros(11 * 60 * 16_000)}), where="x.json:3")
    assert len(encoded["media"]["audio_features"]) == 20
    assert (
        "x.json:3: the audio given in memory lasts 660 s; what follows after 600 s is dropped" in caplog.text
    )


def test_a_sound_in_memory_is_resampled(every):
    part = {"type": "audio", "audio": sound(2)[: 2 * 8000], "sampling_rate": 8000}
    assert every.encode(user(part))["media"]["audio_frames"][0] == 200


def test_one_sample_is_heard(every):
    encoded = every.encode(user({"type": "speech", "speech": np.zeros(1)}))
    assert encoded["media"]["speech_frames"][0] == 10
    assert "<speech>" in every.tokenizer.decode(encoded["input_ids"])


def test_batches_pad_left_for_answers_and_right_for_learning(processor):
    rows = [user(text("a")), user(text("a longer question"))]
    asking = processor.apply_chat_template(rows, tokenize=True, add_generation_prompt=True)
    learning = processor.apply_chat_template(rows, tokenize=True, return_assistant_tokens_mask=True)
    assert asking["attention_mask"][0, 0] == 0 and asking["attention_mask"][0, -1] == 1
    assert learning["attention_mask"][0, 0] == 1 and learning["attention_mask"][0, -1] == 0
    assert learning["assistant_masks"].shape == learning["input_ids"].shape


def test_settings_without_effect_are_named(processor, caplog):
    processor("hi", return_tensors="pt", padding=True, truncation=False, sampling_rate=16000)
    assert not caplog.records
    processor("hi", max_length=3, truncation=True)
    processor.apply_chat_template(user(text("hi")), tokenize=True, continue_final_message=True)
    assert "ignores max_length=3, truncation=True" in caplog.text
    assert "ignores continue_final_message=True" in caplog.text


def test_prompt_text_carries_no_marks(processor):
    messages = [{"role": "user", "content": "what is <image>?"}, {"role": "assistant", "content": "a word"}]
    assert processor.apply_chat_template(messages) == (
        "<|im_start|>user\nwhat is <image>?<|im_end|>\n<|im_start|>assistant\na word<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda p: p("<image><image> two", images=[picture()]),
            "the text holds 2 <image>, but 1 image inputs were given",
        ),
        (lambda p: p("none", speech=[sound(1)]), "the text holds 0 <speech>, but 1 speech inputs were given"),
        (lambda p: p("a <video>"), "the text holds 1 <video>, but 0 video inputs were given"),
        (lambda p: p(images=[picture()]), "the processor needs text"),
        (lambda p: p("a <video>", videos=[[picture()]]), "this model takes no video"),
        (lambda p: p("<speech>", speech=[sound(1)], sampling_rate=8000), "are expected at 16000 Hz"),
        (
            lambda p: p.encode(user({"type": "video", "path": "x.mp4"}), where="x.json:3"),
            "x.json:3: this model takes no video",
        ),
        (
            lambda p: p.encode(user({"type": "smell"}), where="x.json:3"),
            "x.json:3: unknown content type 'smell'",
        ),
        (lambda p: p.encode(user({"type": "speech", "speech": np.zeros((0,))})), "holds no samples"),
    ],
)
def test_bad_input_is_named(processor, call, message):
    with pytest.raises(UserError, match=message):
        call(processor)


def test_saved_and_loaded_it_does_the_same(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    messages = user(
        {"type": "image", "image": picture("blue")}, {"type": "speech", "speech": sound(0.3)}, text("what?")
    )
    one, two = processor.encode(messages), again.encode(messages)
    assert one["input_ids"] == two["input_ids"]
    assert (one["media"]["pixel_values"][0] == two["media"]["pixel_values"][0]).all()
    assert (one["media"]["speech_features"][0] == two["media"]["speech_features"][0]).all()
