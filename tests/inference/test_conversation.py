"""Conversations with a tiny random model: what is remembered, streamed, saved and read back."""

import json

import numpy as np
import pytest
import soundfile
from PIL import Image

from unimoe.data import read_samples
from unimoe.errors import UserError
from unimoe.inference.conversation import Conversation, Settings, detect_modality
from unimoe.model.loading import load_model


@pytest.fixture(scope="module")
def built(tiny_folder):
    return load_model(tiny_folder)


@pytest.fixture
def talk(built):
    model, processor = built
    return Conversation(model, processor, Settings(max_new_tokens=6))


@pytest.fixture
def files(tmp_path):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "a b.png")
    soundfile.write(tmp_path / "q.wav", np.random.default_rng(0).normal(0, 0.1, 8000), 16000)
    return tmp_path


def silent(words):
    pass


def test_the_conversation_is_remembered_and_typed_placeholders_are_text(talk, files):
    talk.attach("image", str(files / "a b.png"), "!image")
    talk.ask("what is <image>?", silent)
    talk.ask("and now?", silent)
    assert [turn["role"] for turn in talk.turns[:1]] == ["user"]
    assert [part["type"] for part in talk.turns[0]["content"]] == ["image", "text"]
    assert talk.attached == []
    encoded = talk.processor.encode(talk.turns)
    placeholder = talk.processor.tokenizer.convert_tokens_to_ids("<image>")
    assert encoded["input_ids"].count(placeholder) == 4  # those of the picture


def test_streamed_words_are_the_answer(talk):
    words = []
    answer = talk.ask("hello", words.append)
    assert "".join(words).strip() == answer == talk.turns[-1]["content"][0]["text"]


def test_sampling_follows_the_seed(talk):
    def answer(seed):
        talk.clear()
        talk.settings = Settings(max_new_tokens=12, temperature=5.0, seed=seed)
        return talk.ask("hello", silent)

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(4)}) > 1


def test_words_that_somebody_waits_for(talk):
    whole = talk.ask("hello", silent)
    talk.clear()
    assert "".join(talk.stream("hello")).strip() == whole
    with pytest.raises(UserError, match="more than the 4096"):
        next(talk.stream("x" * 5000))


def test_nobody_listens_any_more(talk):
    talk.settings = Settings(max_new_tokens=3000)
    answer = talk.stream("hello")
    first = next(answer)
    answer.close()  # returns when the model has stopped
    said = talk.turns[-1]["content"][0]["text"]
    assert said.startswith(first.strip()) and len(said) < 300


def test_who_took_part(talk, files):
    talk.attach("image", str(files / "a b.png"), "!image")
    talk.attach("speech", str(files / "q.wav"), "!speech")
    talk.ask("what?", silent)
    tokens = talk.stats.tokens()
    prompt = talk.processor.encode(talk.turns[:1], add_generation_prompt=True)["input_ids"]
    assert (tokens["image"], tokens["speech"], tokens["answer"]) == (4, 5, 5)  # the sixth was never read
    assert sum(tokens.values()) == len(prompt) + 5
    before = talk.stats
    talk.ask("and now?", silent)
    assert talk.stats is not before


def test_a_second_run_and_the_training_of_shifts_do_not_count(talk):
    talk.ask("what?", silent)
    plain = talk.stats.tokens()
    talk.clear()
    talk.settings = Settings(max_new_tokens=6, contrast=0.5, rewire=1)
    talk.ask("what?", silent)
    assert talk.stats.tokens() == plain


def test_a_saved_conversation_is_taken_up_where_it_was(talk, built, files):
    talk.settings.set("system=Be short.")
    talk.attach("image", str(files / "a b.png"), "!image")
    talk.ask("what?", silent)
    talk.save(str(files / "talk.json"))
    told = json.loads((files / "talk.json").read_text())["messages"]
    assert [turn["role"] for turn in told] == ["system", "user", "assistant"]
    assert told[1]["content"][0] == {"type": "image", "path": "a b.png"}
    assert read_samples(files / "talk.json")[0].modality == "image"  # training could read it

    model, processor = built
    other = Conversation(model, processor, Settings(max_new_tokens=6))
    other.load(str(files / "talk.json"))
    assert other.settings.system == "Be short." and len(other.turns) == 2
    assert other.ask("and now?", silent) == talk.ask("and now?", silent)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not JSON"),
        ("[]", "found 0 conversations"),
        ('{"messages": []}', "there are no turns"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "needs an assistant turn at the end"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image", "path": "gone.png"}]},'
            ' {"role": "assistant", "content": "A dog."}]}',
            "there is no file",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "audio", "path": "q.wav"}]},'
            ' {"role": "assistant", "content": "A dog."}]}',
            "this model takes no audio; it takes text, image, speech",
        ),
    ],
)
def test_what_is_no_session_is_refused_and_changes_nothing(talk, files, content, says):
    talk.ask("hello", silent)
    before = talk.turns
    (files / "bad.json").write_text(content)
    with pytest.raises(UserError, match=says) as caught:
        talk.load(str(files / "bad.json"))
    assert "bad.json" in str(caught.value) and "\n" not in str(caught.value)
    assert talk.turns is before


def test_media_that_lie_in_no_file_cannot_be_saved(talk, files):
    talk.attached = [{"type": "image", "image": Image.new("RGB", (9, 9))}]
    talk.ask("what?", silent)
    with pytest.raises(UserError, match="holds image that has no file"):
        talk.save(str(files / "talk.json"))
    assert not (files / "talk.json").exists()


def test_the_modality_of_a_file_is_found_by_its_content(built, tmp_path):
    processor = built[1]
    Image.new("RGB", (9, 9)).save(tmp_path / "a.wav", "PNG")
    soundfile.write(tmp_path / "b.png", np.zeros(1600), 16000, format="WAV")
    (tmp_path / "notes.mp4").write_text("words")
    assert detect_modality(str(tmp_path / "a.wav"), processor) == "image"
    assert detect_modality(str(tmp_path / "b.png"), processor) == "speech"
    assert detect_modality(str(tmp_path / "b.png"), processor, speech=False) == "audio"
    with pytest.raises(UserError, match="notes.mp4: expected an image, video or audio file"):
        detect_modality(str(tmp_path / "notes.mp4"), processor)
