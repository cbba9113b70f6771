import base64
import io
import os

import numpy as np
import pytest
from PIL import Image

from unimoe.data import parse_record
from unimoe.errors import UserError
from unimoe.media.source import open_media

TEXT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


@pytest.fixture
def media(tmp_path):
    for name in ("a.png", "b.png", "a.wav", "b.wav", "v.mp4"):
        (tmp_path / name).write_bytes(b"content")
    return tmp_path


def text(value):
    return {"type": "text", "text": value}


def llava(*turns, **columns):
    speakers = ("human", "gpt")
    conversations = [{"from": speakers[i % 2], "value": value} for i, value in enumerate(turns)]
    return {**columns, "conversations": conversations}


def parse(record, root=".", **options):
    return parse_record(record, "f.jsonl:3", root, **options)


def fault(record, root=".", **options):
    with pytest.raises(UserError) as caught:
        parse(record, root, **options)
    message = str(caught.value)
    assert message.startswith("f.jsonl:3: ") and "\n" not in message
    return message


def test_llava(media):
    sample = parse(llava("<image>\nWhat is it?", "A cat.", "Sure?", "Yes.", image="a.png", id=7), media)
    image = {"type": "image", "path": str(media / "a.png")}
    assert [turn["role"] for turn in sample.messages] == ["user", "assistant"] * 2
    assert sample.messages[0]["content"] == [image, text("What is it?")]
    assert (sample.id, sample.source, sample.modality) == ("7", "f.jsonl:3", "image")


def test_placeholders_in_the_middle_keep_order_and_text(media):
    sample = parse(llava("from <image> to <image>?", "Far.", image=["a.png", "b.png"]), media)
    parts = sample.messages[0]["content"]
    assert [part["type"] for part in parts] == ["text", "image", "text", "image", "text"]
    assert parts[0]["text"] == "from " and parts[2]["text"] == " to "
    assert [part["path"] for part in sample.media()] == [str(media / "a.png"), str(media / "b.png")]


def test_uni_moe_voice_is_speech_and_its_video_is_a_list_of_frames(media):
    sample = parse(llava("<image>\n<audio>\n<audio>", "ok", image="a.png", voice=["a.wav", "b.wav"]), media)
    assert [part["type"] for part in sample.messages[0]["content"]] == ["image", "speech", "speech"]
    assert sample.modality == "image+speech"
    frames = parse(llava("<video>\nWhat?", "A walk.", video=["a.png", "b.png"]), media)
    assert next(frames.media())["path"] == [str(media / "a.png"), str(media / "b.png")]


def test_audio_column_is_sound_and_speech_column_is_speech(media):
    both = parse(llava("<audio><speech>", "ok", audios=["a.wav"], speeches=["b.wav"]), media)
    assert [(part["type"], part["path"]) for part in both.media()] == [
        ("audio", str(media / "a.wav")),
        ("speech", str(media / "b.wav")),
    ]


def test_openai_parts(media):
    data = base64.b64encode(b"sound").decode()
    content = [
        text("Look <image>"),
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}},
        {"type": "image", "image": "a.png"},
        {"type": "speech", "path": "a.wav"},
    ]
    sample = parse({"messages": [{"role": "user", "content": content}, TEXT[1]]}, media)
    assert sample.messages[0]["content"] == [
        text("Look <image>"),
        {"type": "image", "url": "data:image/png;base64,AAAA"},
        {"type": "speech", "bytes": b"sound"},
        {"type": "image", "path": str(media / "a.png")},
        {"type": "speech", "path": str(media / "a.wav")},
    ]


def test_a_part_without_data_takes_the_next_of_its_column(media):
    content = [{"type": "image"}, text("and"), {"type": "image", "image": None}]
    messages = [{"role": "user", "content": content}, TEXT[1]]
    assert list(parse({"messages": messages, "images": ["a.png", {"bytes": b"x"}]}, media).media()) == [
        {"type": "image", "path": str(media / "a.png")},
        {"type": "image", "bytes": b"x"},
    ]


def test_system_turn_as_message_and_as_column():
    system = {"role": "system", "content": [text("Be kind.")]}
    for record in (
        {"messages": [{"role": "system", "content": "Be kind."}, *TEXT]},
        {"messages": TEXT, "system": "Be kind."},
    ):
        assert parse(record).messages[0] == system


def test_a_prompt_needs_no_answer_outside_training():
    assert len(parse({"messages": TEXT[:1]}, training=False).messages) == 1
    assert "assistant turn at the end" in fault({"messages": TEXT[:1]})


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (llava("<image>", "x"), "found 1 <image> placeholders and 0 images"),
        (llava("no place", "x", image="a.png"), "found 0 <image> placeholders and 1 images"),
        (llava("<image><image>", "x", image=["a.png"]), "found 2 <image> placeholders and 1 images"),
        (llava("<audio>", "x", voice=["a.wav", "b.wav"]), "found 1 <speech> placeholders and 2 speech clips"),
        (llava("<image>", "x", image="gone.png"), "gone.png"),
        (llava("<image>", "x", image="https://a.b/c.png"), "remote URL"),
        (llava("<image>", "x", image=3), "expected a path or a data URL, found a number"),
        (llava("Hi", "an <image>", image="a.png"), "turn 2: found image in an assistant turn"),
        (llava("Hi", " "), "turn 2 (gpt) is empty"),
        (llava(), "there are no turns"),
        ([], "the sample must be an object, found a list"),
        ({"text": "Hi"}, "found ['text']"),
        ({"messages": TEXT, "conversations": []}, "expected the key"),
        (llava("<image>", "x", image=""), "expected a path or a data URL, found an empty text"),
        (llava("<image>", "x", image="HTTP://a.b/c.png"), "remote URL"),
        (llava("<image>", "x", image="../"), "is a folder, expected a file"),
        (llava("\ud83d", "x"), "turn 1 holds half a character"),
        ({"messages": "Hi"}, '"messages" must be a list, found text'),
        ({"messages": ["Hi"]}, "turn 1 must be an object, found text"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "turn 1: found the role 'tool'"),
        ({"messages": [{"content": "x"}]}, "turn 1: found the role None"),
        ({"messages": [{"role": "user", "content": None}]}, "expected text or a list of parts"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 'turn 1: "text" must be text'),
        ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "part of type 'smell'"),
        ({"messages": [TEXT[1], TEXT[0]]}, "turn 1 is from assistant, expected user"),
        ({"messages": [TEXT[0], TEXT[0], TEXT[1]]}, "turn 2 is from user, expected assistant"),
        ({"messages": [*TEXT, {"role": "system", "content": "x"}]}, "turn 3 is from system, expected user"),
        ({"messages": [{"role": "system", "content": "x"}]}, "there are no turns"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "base64": "?"}]}]},
            "turn 1: not valid base64",
        ),
    ],
)
def test_faults(media, record, expected):
    assert expected in fault(record, media)


def test_a_style_asks_for_its_key():
    assert 'expected the key "messages"' in fault(llava("Hi", "x"), style="messages")
    assert 'expected the key "conversations"' in fault({"messages": TEXT}, style="llava")


def test_a_key_that_holds_nothing_is_not_there():
    assert len(parse({"conversations": None, "messages": TEXT}).messages) == 2


def test_films_and_sounds_by_address(media):
    asked = [
        {"type": f"{kind}_url", f"{kind}_url": {"url": "data:;base64,eA=="}} for kind in ("video", "audio")
    ]
    found = parse({"messages": [{"role": "user", "content": asked}, TEXT[1]]})
    assert [part["type"] for part in found.media()] == ["video", "audio"]


def test_frames_of_the_one_video_that_a_part_stands_for(media):
    turns = [{"role": "user", "content": [{"type": "video"}, text("What?")]}, TEXT[1]]
    (part,) = parse({"messages": turns, "video": ["a.png", "b.png"]}, media).media()
    assert part["path"] == [str(media / "a.png"), str(media / "b.png")]


@pytest.mark.parametrize("name", ["a.png", "a b.png", "café.png", "a#1.png", "100%25.png", "ü?x.png"])
def test_file_urls_of_any_name(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"content")
    for url in (
        path.as_uri(),
        f"file://localhost{path}",
        f"FILE://{path}",
        f"file:{path}",
        f"file:///{path}",
    ):
        sample = parse(llava("<image>What?", "Red.", image=url))
        assert os.path.realpath(next(sample.media())["path"]) == str(path)


def test_paths_written_on_windows(media):
    (media / "sub").mkdir()
    (media / "sub" / "c.png").write_bytes(b"content")
    sample = parse(llava("<image>What?", "Red.", image="sub\\c.png"), media)
    assert next(sample.media())["path"] == str(media / "sub" / "c.png")


def png(*size):
    noise = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(4, 4), (300, 300)])
def test_base64_without_a_data_url(size):
    content = png(*size)
    text = base64.b64encode(content).decode()
    for value in (text, {"bytes": text, "path": None}, {"base64": text}, f"DATA:image/png;BASE64,{text}"):
        part = next(parse(llava("<image>What?", "Noise.", images=[value])).media())
        assert open_media(part, "x").read() == content


def test_no_message_holds_a_whole_file():
    unknown = base64.b64encode(b"no media at all " * 30_000).decode()
    message = fault(llava("<image>What?", "Noise.", image=unknown))
    assert "there is no file" in message and "looks like base64 of no known format" in message
    assert len(message) < 250
    for value in ("https://example.org/" + "a" * 9000, "S3+x://bucket/" + "a" * 9000):
        message = fault(llava("<image>What?", "Noise.", image=value))
        assert "is a remote URL; download it" in message and len(message) < 300


def test_nulls_that_tables_leave(media):
    empty = {"bytes": None, "path": None}
    turns = [
        {"from": "human", "value": "<image>What?", "role": None, "content": None},
        {"from": "gpt", "value": "A cat.", "weight": float("nan")},
    ]
    record = {
        "conversations": turns,
        "messages": None,
        "images": [None, "a.png", empty],
        "video": float("nan"),
    }
    sample = parse({**record, "audio": empty, "system": None, "id": None}, media)
    assert [part["path"] for part in sample.media()] == [str(media / "a.png")] and sample.id is None
    asked = [
        {"type": "image", "text": None, "path": None, "image": None},
        {"type": "text", "text": "What?", "path": None, "image": None},
        {"type": "image", "text": None, "path": "b.png", "image": empty},
    ]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": "Two."}]
    sample = parse({"messages": messages, "images": ["a.png"]}, media)
    assert [part["path"] for part in sample.media()] == [str(media / "a.png"), str(media / "b.png")]
    missing = fault({"messages": messages, "images": [None]}, media)
    assert "found 1 <image> placeholders and 0 images" in missing


def test_nested_lists_of_images(media):
    sample = parse(llava("<image><image>", "Two.", images=[["a.png"], ["b.png"]]), media)
    assert len(list(sample.media())) == 2
    asked = [{"type": "image", "image": ["a.png"]}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": "One."}]
    assert next(parse({"messages": messages}, media).media())["path"] == str(media / "a.png")


@pytest.mark.parametrize(
    "part", [{"type": ["image"]}, {"type": {}}, {"type": 3}, {}, {"type": "image", "path": 3}]
)
def test_parts_of_wrong_types(part):
    messages = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "x"}]
    assert "turn 1" in fault({"messages": messages})
