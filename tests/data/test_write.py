from PIL import Image

from unimoe.data import Sample, load_image, load_video, read_samples, write_samples
from unimoe.data.read import stream_samples
from unimoe.media.source import describe, media_bytes


def test_written_samples_read_back_the_same(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "frame.png").touch()
    here, outside = str(tmp_path / "set" / "b.wav"), str(tmp_path / "a.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "b.wav").touch()
    content = [
        {"type": "image", "path": outside},
        {"type": "speech", "path": here},
        {"type": "image", "url": "data:image/png;base64,AAAA"},
        {"type": "video", "path": [str(tmp_path / "frame.png")] * 2},
        {"type": "text", "text": "a typed <image>\n"},
    ]
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "Ja, schön."}]},
    ]
    path = tmp_path / "set" / "data.jsonl"
    write_samples(path, [Sample(messages, "nowhere", "x1")])
    assert '"b.wav"' in path.read_text() and "schön" in path.read_text(encoding="utf-8")
    assert read_samples(path) == [Sample(messages, f"{path}:1", "x1")]
    (tmp_path / "a.png").write_bytes(b"png")
    (tmp_path / "frame.png").write_bytes(b"frame")
    (tmp_path / "set" / "b.wav").write_bytes(b"wav")
    read = [(part["type"], media_bytes(part, "")) for part in Sample(messages, "").media()]
    for name in ("data.parquet", "data.tar"):
        write_samples(tmp_path / name, [Sample(messages, "nowhere", "x1")] * 2)
        for found in read_samples(tmp_path / name):
            assert [(part["type"], media_bytes(part, "")) for part in found.media()] == read
            assert found.id == "x1" and found.messages[0::2] == messages[0::2]
    in_memory = [{"role": "user", "content": [{"type": "image", "bytes": b"abc"}]}, messages[2]]
    write_samples(path, [Sample(in_memory, "nowhere")])
    assert next(read_samples(path)[0].media())["url"].endswith("base64,YWJj")


def test_videos_that_are_lists_of_frames_stay_so_in_every_format(tmp_path):
    for number, grey in enumerate((10, 100, 200)):
        Image.new("RGB", (8, 8), (grey, grey, grey)).save(tmp_path / f"{number}.png")
    (tmp_path / "film.mp4").write_bytes(b"a film")
    asked = [
        {"type": "video", "path": [str(tmp_path / "2.png"), str(tmp_path / "0.png")]},
        {"type": "image", "path": str(tmp_path / "1.png")},
        {"type": "video", "path": str(tmp_path / "film.mp4")},
        {"type": "video", "path": [str(tmp_path / "1.png")]},
    ]
    said = {"role": "assistant", "content": [{"type": "text", "text": "Grey."}]}
    sample = Sample([{"role": "user", "content": asked}, said], "nowhere", "x")
    plain = Sample([{"role": "user", "content": [asked[2]]}, said], "nowhere", "y")

    def seen(sample):
        first, image, film, last = sample.media()
        frames = [load_video(part, "x")[i] for part, i in ((first, 0), (first, 1), (last, 0))]
        greys = [picture.getpixel((4, 4))[0] for picture in (*frames, load_image(image, "x"))]
        return greys, media_bytes(film, "x")

    write_samples(tmp_path / "set.parquet", [plain, sample])
    for convert in (True, False):
        _, found = stream_samples(tmp_path / "set.parquet", convert=convert)
        assert seen(found) == ([200, 10, 100, 100], b"a film")
    for name in ("set.tar", "set.jsonl", "set.parquet", "again.tar"):  # each from the one before
        write_samples(tmp_path / name, [plain, sample])
        plain, sample = read_samples(tmp_path / name)
        assert seen(sample) == ([200, 10, 100, 100], b"a film") and len(list(plain.media())) == 1
        assert describe(next(sample.media())).startswith("of 2 frames (")
