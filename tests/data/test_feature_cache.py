import logging
import pickle

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from unimoe.data import Collator, FeatureCache, parse_record
from unimoe.errors import UserError
from unimoe.testing import AUDIO, SPEECH, VIDEO, tiny_model


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(tmp_path):
    noise = np.random.default_rng(0)
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(noise.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(tmp_path / name)
    for name, seconds in (("short.wav", 0.7), ("long.wav", 31)):
        soundfile.write(tmp_path / name, 0.1 * noise.standard_normal(int(16000 * seconds)), 16000)
    (tmp_path / "twin.png").write_bytes((tmp_path / "a.png").read_bytes())
    return tmp_path


@pytest.fixture
def samples(folder):
    def sample(index, question, **columns):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "A fox."}]
        return parse_record({**columns, "messages": turns}, f"data.json[{index}]", folder)

    return [
        sample(0, "<image>What?", images=["a.png"]),
        sample(1, "<image><image>Same?", images=["b.png", "twin.png"]),
        sample(2, "<speech>", speeches=["short.wav"]),
        sample(3, "<image><speech>", images=["c.png"], speeches=["long.wav"]),
        sample(4, "Hello"),
    ]


def make(built, folder, **options):
    model, processor = built
    return FeatureCache(folder / "cache", processor, dict(model.model.encoders), **options)


def stored(cache, part):
    windows = cache.get(cache.key(part, "f"))
    assert windows is not None
    return windows


def test_the_model_computes_the_same_from_stored_features(built, folder, samples):
    model, processor = built
    cache = make(built, folder)
    assert cache.fill(samples, batch_size=2) == 5  # twin.png is a.png
    live, stored = Collator(processor)(samples), Collator(processor, features=cache)(samples)
    assert torch.equal(stored["input_ids"], live["input_ids"])
    assert torch.equal(stored["labels"], live["labels"])
    assert not {"pixel_values", "speech_features", "speech_frames"} & set(stored)
    images, lengths = stored["encoded_media"]["image"]
    assert images.shape[0] == 4 and lengths is None
    speech, lengths = stored["encoded_media"]["speech"]
    assert speech.shape[:2] == (3, 1500) and lengths.tolist() == [35, 1500, 50]  # 31 s are two windows
    with torch.no_grad():
        expected, found = model(**live), model(**stored)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.loss, expected.loss)


def test_videos_and_a_sound_of_two_kinds(folder, tmp_path):
    media = {"video": VIDEO, "speech": SPEECH, "audio": AUDIO}
    model, processor = tiny_model(tmp_path, **media)
    turns = [{"role": "user", "content": "<video><video>"}, {"role": "assistant", "content": "A fox."}]
    videos = [["a.png", "b.png", "c.png"], ["b.png"]]
    heard = [{"role": "user", "content": "<audio><speech>"}, {"role": "assistant", "content": "A fox."}]
    samples = [
        parse_record({"videos": videos, "messages": turns}, "f[0]", folder),
        parse_record({"audio": "short.wav", "speech": "short.wav", "messages": heard}, "f[1]", folder),
    ]
    cache = make((model, processor), folder)
    assert cache.fill(samples) == 4
    live, stored = Collator(processor)(samples), Collator(processor, features=cache)(samples)
    features, lengths = stored["encoded_media"]["video"]
    assert features.shape[:2] == (2, 12) and lengths.tolist() == [12, 4]
    with torch.no_grad():
        torch.testing.assert_close(model(**stored).logits, model(**live).logits, atol=1e-4, rtol=1e-4)


def test_stored_media_are_not_decoded(built, folder, samples, monkeypatch):
    cache = make(built, folder)
    cache.fill(samples)
    for preprocessor in built[1].preprocessors.values():
        monkeypatch.setattr(preprocessor, "load", None)
    assert "encoded_media" in Collator(built[1], features=cache)(samples)
    assert "encoded_media" not in Collator(built[1], features=cache)(samples[4:])


def test_only_the_given_kinds_are_cached(built, folder, samples):
    model, processor = built
    cache = FeatureCache(folder / "cache", processor, {"image": model.model.encoders["image"]})
    assert cache.fill(samples) == 3
    batch = Collator(processor, features=cache)(samples)
    assert set(batch["encoded_media"]) == {"image"} and "speech_features" in batch


def test_goes_on_where_it_was_cut_off(built, folder, samples, monkeypatch, caplog):
    cache = make(built, folder)
    add, written = FeatureCache.add, []

    def interrupted(self, entries):
        if written:
            raise KeyboardInterrupt
        written.extend(entries)
        add(self, entries)

    monkeypatch.setattr(FeatureCache, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.fill(samples, shard_size=2)
    monkeypatch.undo()
    assert len(list((folder / "cache").iterdir())) == 1
    with caplog.at_level(logging.INFO):
        assert make(built, folder).fill(samples, shard_size=2) == 3
    assert "encoded 3 of 3 media" in caplog.text
    assert make(built, folder).fill(samples) == 0


def test_keys_tell_encoders_preprocessing_and_precision_apart(built, folder, samples, monkeypatch):
    model, processor = built
    part = next(samples[0].media())
    cache = make(built, folder)
    keys = {cache.key(part, "f"), make(built, folder, dtype=torch.float16).key(part, "f")}
    bias = next(model.model.encoders["image"].parameters())
    with torch.no_grad():
        original = bias.clone()
        bias += 1
    keys.add(make(built, folder).key(part, "f"))
    with torch.no_grad():
        bias.copy_(original)
    assert make(built, folder).key(part, "f") in keys
    monkeypatch.setitem(processor.modalities["image"]["preprocessing"], "interpolation", "nearest")
    keys.add(make(built, folder).key(part, "f"))
    assert len(keys) == 4


def test_half_precision_is_half_the_size_and_close(built, folder, samples):
    cache, half = make(built, folder), make(built, folder, dtype=torch.float16)
    cache.fill(samples[:2])
    half.fill(samples[:2])
    part = next(samples[0].media())
    (full_SD,), (half_SD,) = stored(cache, part), stored(half, part)
    assert half_SD.dtype == torch.float32
    torch.testing.assert_close(half_SD, full_SD, atol=1e-3, rtol=1e-3)
    small, large = sorted(file.stat().st_size for file in (folder / "cache").iterdir())
    assert small < 0.6 * large


def test_a_copy_in_a_worker_reads_the_same_but_holds_no_encoders(built, folder, samples):
    cache = make(built, folder)
    cache.fill(samples[:1])
    part = next(samples[0].media())
    copy = pickle.loads(pickle.dumps(cache))
    assert torch.equal(stored(copy, part)[0], stored(cache, part)[0])
    assert not copy.encoders


def test_faults_name_the_sample(built, folder, samples):
    cache = make(built, folder)
    with pytest.raises(UserError, match=r"^data\.json\[0\]: .*a\.png is not in the feature cache"):
        Collator(built[1], features=cache)(samples)
    (folder / "b.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"^data\.json\[1\]: cannot decode the image .*b\.png"):
        cache.fill(samples)
    (folder / "cache").mkdir(exist_ok=True)
    (folder / "cache" / "x.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="not a complete safetensors file"):
        make(built, folder)


def test_a_changed_file_is_noticed(built, folder, samples):
    cache = make(built, folder)
    cache.fill(samples[:1])
    part = next(samples[0].media())
    before = cache.key(part, "f")
    content = bytearray((folder / "a.png").read_bytes())
    other = Image.fromarray(np.asarray(Image.open(folder / "a.png")) ^ 1)
    other.save(folder / "a.png")
    assert cache.key(part, "f") != before
    with pytest.raises(UserError, match="not in the feature cache"):
        Collator(built[1], features=cache)(samples[:1])
    assert cache.fill(samples[:1]) == 1 and "encoded_media" in Collator(built[1], features=cache)(samples[:1])
    (folder / "a.png").write_bytes(content)
    assert cache.key(part, "f") == before  # what was stored then is found again


def test_an_unchanged_file_is_read_once(built, folder, samples, monkeypatch):
    cache = make(built, folder)
    cache.fill(samples)
    read = []
    monkeypatch.setattr(
        "unimoe.data.feature_cache.media_bytes", lambda part, where: read.append(part) or b"x"
    )
    Collator(built[1], features=cache)(samples)
    assert not read


def test_processes_share_what_they_store(built, folder, samples):
    mine, theirs = make(built, folder), make(built, folder)
    assert (mine.fill(samples[::2]), theirs.fill(samples[1::2])) == (2, 4)  # both met a.png
    mine.refresh()
    assert mine.fill(samples) == 0
