"""The parts of the engines' benchmark that need no server."""

import base64
import importlib.util
from pathlib import Path

import pytest

from unimoe.serve.protocol import ChatRequest
from unimoe.testing import IMAGE, tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("benchmarks_engines", ROOT / "benchmarks" / "engines.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_messages_with_media_are_requests_of_the_server(bench, tmp_path):
    for name in ("a.jpg", "b.flac", "c.mp4", "d.wav"):
        (tmp_path / name).write_bytes(name.encode())
    media = {"image": "a.jpg", "speech": "b.flac", "video": "c.mp4", "audio": "d.wav"}
    parts = [{"type": kind, "path": str(tmp_path / name)} for kind, name in media.items()]
    sent = bench.over_http([{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}])
    request = ChatRequest.model_validate({"messages": sent})
    request.check()
    image, speech, video, audio, text = request.messages[0].content
    assert base64.b64decode(speech.input_audio.data) == b"b.flac"
    assert image.image_url.url.startswith("data:image/jpg;base64,")
    assert (video.type, audio.type, text.text) == ("video_url", "audio_url", "?")


def test_weights_in_llama_cpp_are_its_file_and_the_encoders(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("UNIMOE_CACHE", str(tmp_path / "cache"))
    model, processor = tiny_model(tmp_path, {"placement": "all"}, image=IMAGE)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    media = sum(p.numel() for p in [*model.model.encoders.parameters(), *model.model.connectors.parameters()])
    media += sum(b.numel() for b in model.model.encoders.state_dict().values()) - sum(
        p.numel() for p in model.model.encoders.parameters()
    )
    from unimoe.inference.gguf import source_hash

    file = tmp_path / "cache" / "gguf" / f"{source_hash(tmp_path / 'model')}-q8_0.gguf"
    file.parent.mkdir(parents=True)
    file.write_bytes(bytes(1000))
    found = bench.megabytes_of_weights("q8_0", str(tmp_path / "model")) * 1e6
    assert found == pytest.approx(1000 + 4 * media, rel=0.01)
    assert bench.megabytes_of_weights("torch", str(tmp_path / "model")) * 1e6 > found


class Echo:
    """A server whose answer is the question."""

    def __init__(self, reply):
        self.reply = reply

    def ask(self, messages, tokens):
        return self.reply(messages[0]["content"], tokens, 0.1)


def test_no_round_is_begun_after_the_minutes(bench):
    servers = {name: Echo(bench.serve.Reply) for name in ("torch", "q8_0")}
    asked = bench.long_questions(10)
    assert len({one[0]["content"] for one in asked}) == 10
    rows = bench.compare(servers, asked, 8, [1, 4], 3)
    assert [(row["clients"], row["engine"]) for row in rows] == [
        (count, name) for count in (1, 4) for name in servers
    ]
    assert all(row["equal"] == 10 and row["rounds"] == 3 for row in rows)
    assert bench.compare(servers, asked, 8, [1, 4], 3, minutes=0) == []


def test_the_server_before_is_a_checkout_or_a_commit(bench, tmp_path):
    with bench.checkout(str(ROOT)) as code:
        assert code == ROOT
    with pytest.raises(SystemExit, match=f"--before {tmp_path}: neither a checkout nor a commit"):
        bench.checkout(str(tmp_path)).__enter__()
