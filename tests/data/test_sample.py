import io

from unimoe.data import Sample


def sample(*parts: dict, answer: str = "A cat.", id: str | None = None) -> Sample:
    user = {"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}
    said = {
        "role": "assistant",
        "content": [{"type": "text", "text": answer[:2]}, {"type": "text", "text": answer[2:]}],
    }
    return Sample([user, said], "set.jsonl:3", id)


def test_the_modality_is_a_set_in_a_fixed_order():
    image, speech = {"type": "image", "path": "a.png"}, {"type": "speech", "path": "a.wav"}
    assert sample().modality == "text"
    assert sample(speech, image, speech).modality == sample(image, speech).modality == "image+speech"
    assert list(sample(speech, image, speech).media()) == [speech, image, speech]


def test_the_last_turn_is_split_off():
    whole = sample(id="7")
    asked, answer = whole.split_answer()
    assert answer == "A cat." and asked.messages == whole.messages[:1]
    assert (asked.id, asked.source) == ("7", "set.jsonl:3") and len(whole.messages) == 2


def test_records_name_files_below_their_folder_and_hold_all_others(tmp_path):
    class Stored(io.BytesIO):
        """A member of a shard: bytes that are read when they are asked for."""

    inside, outside = str(tmp_path / "media" / "a.png"), "/elsewhere/b.png"
    record = sample(
        {"type": "image", "path": inside},
        {"type": "image", "path": outside},
        {"type": "video", "path": [inside, outside]},
        {"type": "image", "bytes": b"abc"},
        {"type": "speech", "stored": Stored(b"abc")},
        {"type": "image", "url": "data:image/png;base64,AAAA"},
        id="x",
    ).to_record(tmp_path)
    data = "data:application/octet-stream;base64,YWJj"
    assert record["id"] == "x" and record["messages"][0]["content"] == [
        {"type": "image", "path": "media/a.png"},
        {"type": "image", "path": outside},
        {"type": "video", "path": ["media/a.png", outside]},
        {"type": "image", "url": data},
        {"type": "speech", "url": data},
        {"type": "image", "url": "data:image/png;base64,AAAA"},
        {"type": "text", "text": "What?"},
    ]
    assert "id" not in sample().to_record(tmp_path)
