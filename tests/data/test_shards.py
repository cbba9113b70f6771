import io
import json
import tarfile

import pytest

from unimoe.data import read_samples
from unimoe.data.shards import shard_records
from unimoe.errors import UserError
from unimoe.media.source import frame_parts, media_bytes

ASKED = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}]


def write(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def media(sample):
    return [(part["type"], media_bytes(part, "x")) for part in sample.media()]


def test_samples_of_a_shard(tmp_path):
    spoken = [{"role": "user", "content": "<image><speech>"}, ASKED[1]]
    named = [{"from": "human", "value": "<image><image>Same?"}, {"from": "gpt", "value": "No."}]
    path = write(
        tmp_path / "a.tar",
        {
            "000.png": b"picture",
            "000.json": {"messages": ASKED},
            "in/001.json": {"messages": spoken, "id": "x"},
            "in/001.jpg": b"p",
            "in/001.wav": b"s",
            "002.json": {"conversations": named, "image": ["002.b.png", "a.png"]},
            "002.a.png": b"first",
            "002.b.png": b"second",
            "003.jpg": b"p",
            "003.txt": b" a dog \n",
            "004.json": {"messages": [{"role": "user", "content": [{"type": "audio"}]}, ASKED[1]]},
            "004.flac": b"sound",
        },
    )
    samples = read_samples(path)
    assert [sample.source for sample in samples][:2] == [f"{path}:000", f"{path}:in/001"]
    assert [sample.id for sample in samples] == ["000", "x", "002", "003", "004"]
    assert [media(sample) for sample in samples] == [
        [("image", b"picture")],
        [("image", b"p"), ("speech", b"s")],
        [("image", b"second"), ("image", b"first")],
        [("image", b"p")],
        [("audio", b"sound")],
    ]
    assert samples[3].messages[1]["content"] == [{"type": "text", "text": "a dog"}]


def test_parts_of_messages_name_files_of_the_sample(tmp_path):
    named = [{"type": "image", "path": "000.b.png"}, {"type": "image_url", "image_url": {"url": "000.a.png"}}]
    turns = [{"role": "user", "content": [*named, {"type": "text", "text": "000.a.png"}]}, ASKED[1]]
    files = {"000.json": {"messages": turns}, "000.a.png": b"first", "000.b.png": b"second"}
    (sample,) = read_samples(write(tmp_path / "a.tar", files))
    assert media(sample) == [("image", b"second"), ("image", b"first")]
    assert sample.messages[0]["content"][2]["text"] == "000.a.png"


def test_files_that_belong_to_no_sample(tmp_path):
    files = {"README": b"x", "__meta__.json": b"{}"}
    for name, content in {"000.jpg": b"p", "000.json": {"messages": ASKED}}.items():
        files |= {f"./._{name}": b"fork", f"./{name}": content}
    assert [media(sample) for sample in read_samples(write(tmp_path / "a.tar", files))] == [[("image", b"p")]]


def test_a_video_of_frames_in_a_shard(tmp_path):
    frames = {"000.0.png": b"one", "000.1.png": b"two"}
    asked = [{"role": "user", "content": "<video>What?"}, ASKED[1]]
    record = {"messages": asked, "video": list(frames)[::-1]}
    (sample,) = read_samples(write(tmp_path / "a.tar", {"000.json": record, **frames}))
    (part,) = sample.media()
    assert part["type"] == "video"
    assert [media_bytes(frame, "x") for frame in frame_parts(part)] == [b"two", b"one"]
    gone = {**record, "video": ["000.0.png", "000.7.png"]}
    with pytest.raises(UserError, match=r'a\.tar:000: "video" 1: a frame: there is no file .*000\.7\.png'):
        read_samples(write(tmp_path / "a.tar", {"000.json": gone, **frames}))
    (tmp_path / "000.7.png").touch()
    with pytest.raises(UserError, match="found frames given by path and by stored, expected one way for all"):
        read_samples(tmp_path / "a.tar")


def test_several_shards_in_order(tmp_path):
    for number in range(12):
        write(tmp_path / f"s-{number:02d}.tar", {f"{number}.json": {"prompt": "Hi", "completion": "Ho"}})
    for name in ("s-{00..11}.tar", "s-*.tar", "", "s-{00..05}{.tar,.tar}"):
        ids = [sample.id for sample in read_samples(tmp_path / name)]
        expected = map(str, range(12)) if "," not in name else (str(n) for n in range(6) for _ in "ab")
        assert ids == list(expected)
    with pytest.raises(UserError, match=r"there is no data file .*s-12\.tar"):
        read_samples(tmp_path / "s-{11..12}.tar")


@pytest.mark.parametrize("kept", [0.95, 0.6, 0.3])
def test_a_shard_cut_in_the_middle(tmp_path, kept):
    files = {}
    for number in range(20):
        files |= {f"{number:02d}.json": {"messages": ASKED}, f"{number:02d}.png": bytes(1500)}
    path = write(tmp_path / "a.tar", files)
    content = path.read_bytes()
    whole = 20 * (512 + 512 + 512 + 1536)
    path.write_bytes(content[: int(whole * kept)])
    found = list(shard_records(path))
    assert found[-1][1].kind == "truncated" and "truncated" in str(found[-1][1])
    assert len(found) - 1 == pytest.approx(20 * kept, abs=1)
    with pytest.raises(UserError, match=r"a\.tar: the archive is (broken or )?truncated"):
        read_samples(path)


def test_a_shard_cut_between_two_samples(tmp_path):
    path = write(tmp_path / "a.tar", {f"{n}.json": {"prompt": "Hi", "completion": "Ho"} for n in range(4)})
    path.write_bytes(path.read_bytes()[: 2 * 1024])
    assert [source for source, _ in shard_records(path)] == [f"{path}:0", f"{path}:1", str(path)]
    with pytest.raises(UserError, match="truncated: it has no end mark"):
        read_samples(path)


def test_a_shard_with_something_behind_its_end(tmp_path):
    path = write(tmp_path / "a.tar", {f"{n}.json": {"prompt": "Hi", "completion": "Ho"} for n in range(4)})
    whole = path.read_bytes()
    assert len(list(shard_records(path))) == 4
    second = 2 * 1024  # where the third sample's header begins
    for content, read, message in (
        (whole[:second] + b"x" * 512 + whole[second + 512 :], 2, "no file header at byte 2,048"),
        (whole[:second] + bytes(1024) + whole[second + 1024 :], 2, "end mark at byte 2,048 .* byte 3,072"),
        (whole + whole, 4, "end mark at byte 4,096 and something else at byte 10,240, expected zeros"),
    ):
        path.write_bytes(content)
        *good, (source, fault) = shard_records(path)
        assert len(good) == read and (source, fault.kind) == (str(path), "truncated")
        with pytest.raises(UserError, match=rf"a\.tar: the archive is broken: found .*{message}"):
            read_samples(path)
    path.write_bytes(whole + bytes(3 * 512 + 10))
    assert len(read_samples(path)) == 4


def test_faults_of_a_shard_do_not_end_it(tmp_path):
    good = {"messages": [{"role": "user", "content": "Hi"}, ASKED[1]]}
    path = write(tmp_path / "a.tar", {"0.json": b"{", "1.json": good, "2.png": b"p", "3.json": b"\xff"})
    kinds = [getattr(record, "kind", "good") for _, record in shard_records(path)]
    assert kinds == ["not JSON", "good", "malformed", "not JSON"]


def test_what_is_no_archive(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"x" * 2000)
    with pytest.raises(UserError, match="expected an uncompressed tar archive"):
        read_samples(tmp_path / "a.tar")
