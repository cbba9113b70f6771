"""Talking to a tiny random model: one-shot answers, the loop over lines, commands, and what goes wrong."""

import io
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from PIL import Image

from unimoe import chat, cli
from unimoe.chat import Conversation, Settings, Terminal
from unimoe.errors import UserError
from unimoe.generate import count_parameters, generate
from unimoe.loading import load_model
from unimoe.testing import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model, processor = tiny_model(tmp_path_factory.mktemp("parts"), {"num_experts": 4, "top_k": 2})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def built(folder):
    return load_model(folder)


@pytest.fixture
def files(tmp_path):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "a b.png")
    sound = np.random.default_rng(0).normal(0, 0.1, (44100, 2)).astype(np.float32)
    soundfile.write(tmp_path / "q.wav", sound, 44100)  # stereo at 44.1 kHz
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    return tmp_path


@pytest.fixture
def talk(built):
    model, processor = built
    return Conversation(model, processor, Settings(max_new_tokens=6))


def run(monkeypatch, capsys, lines, *args):
    """Exit status and output of ``unimoe chat`` with ``lines`` on a standard input that is no terminal."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    status = cli.main(["chat", *map(str, args)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_one_shot_prints_only_the_answer(folder, files, built, monkeypatch, capsys):
    args = ["-p", "What is this?", "--image", files / "a b.png", "--max-new-tokens", 6]
    status, out, err = run(monkeypatch, capsys, [], folder, *args)
    model, processor = built
    parts = [{"type": "image", "path": files / "a b.png"}, {"type": "text", "text": "What is this?"}]
    asked = [{"role": "user", "content": parts}]
    batch = processor.apply_chat_template(asked, tokenize=True, add_generation_prompt=True)
    assert (status, out.strip(), err) == (0, generate(model, processor, batch, 6)[0], "")


def test_sound_alone_is_the_message(folder, files, monkeypatch, capsys):
    args = ["--audio", files / "q.wav", "--max-new-tokens", 4]
    status, out, err = run(monkeypatch, capsys, ["never read"], folder, *args)
    assert (status, err) == (0, "")
    assert out.count("\n") >= 1


def test_every_line_is_a_message_until_the_input_ends(folder, files, monkeypatch, capsys):
    asked = []

    def ask(self, text, write):
        asked.append((text, len(self.attached)))

    monkeypatch.setattr(Conversation, "ask", ask)
    picture = files / "a b.png"
    lines = [
        f"!image {picture}",
        "what?",
        "",
        "!image 'no.png'",
        "and <image>?",
        "!set seed=3",
        "!exit",
        "unread",
    ]
    status, out, err = run(monkeypatch, capsys, lines, folder)
    assert status == 0
    assert asked == [("what?", 1), ("and <image>?", 1)]  # this stand-in takes no attachment away
    assert err.splitlines() == ["unimoe: error: !image: cannot read no.png: No such file or directory"]


def test_the_conversation_is_remembered_and_typed_placeholders_are_text(talk, files):
    talk.attach("image", str(files / "a b.png"), "!image")
    talk.ask("what is <image>?", lambda words: None)
    talk.ask("and now?", lambda words: None)
    assert [turn["role"] for turn in talk.turns[:1]] == ["user"]
    assert [part["type"] for part in talk.turns[0]["content"]] == ["image", "text"]
    assert talk.attached == []
    encoded = talk.processor.encode(talk.turns)
    placeholder = talk.processor.tokenizer.convert_tokens_to_ids("<image>")
    assert encoded["input_ids"].count(placeholder) == 4  # those of the picture


def test_streamed_words_are_the_answer(talk):
    words = []
    answer = talk.ask("hello", words.append)
    assert "".join(words).strip() == answer == talk.turns[-1]["content"]


def test_sampling_follows_the_seed(talk):
    def answer(seed):
        talk.clear()
        talk.settings = Settings(max_new_tokens=12, temperature=5.0, seed=seed)
        return talk.ask("hello", lambda words: None)

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(4)}) > 1


def test_an_interrupted_answer_is_kept_as_far_as_it_came(talk, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    put, tokens = chat.TextStreamer.put, []

    def stop(self, value):
        put(self, value)
        tokens.append(value)
        if len(tokens) == 4:  # the prompt and three tokens
            raise KeyboardInterrupt

    whole = talk.ask("hello", lambda words: None)
    talk.clear()
    monkeypatch.setattr(chat.TextStreamer, "put", stop)
    Terminal(talk, "tiny").handle("hello")
    out = capsys.readouterr().out
    assert out.endswith(" [stopped]\n")
    kept = talk.turns[-1]["content"]
    assert kept and whole.startswith(kept) and len(kept) < len(whole)
    assert out.startswith(kept)


def test_commands(talk, files, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    terminal = Terminal(talk, "tiny")
    terminal.handle(f"!image {files / 'a b.png'}")
    terminal.handle("!audio '" + str(files / "q.wav") + "'")
    terminal.handle("!set temperature = 0.5")
    terminal.handle("!set system=Be short.")
    terminal.handle("!status")
    terminal.handle("!help")
    out = capsys.readouterr().out
    assert "a b.png" in out and "temperature      0.5" in out and "Be short." in out and "!clear" in out
    terminal.handle("")  # sends the sound
    assert talk.attached == []
    terminal.handle("!clear")
    assert talk.turns == []
    with pytest.raises(EOFError):
        terminal.handle("!exit")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("!image", "expected a file"),
        ("!image /nowhere.png", "cannot read /nowhere.png"),
        ("!save x", "unknown command !save"),
        ("!set speed=3", "expected name=value"),
        ("!set seed", "expected name=value"),
        ("!set seed=x", "found 'x', expected a whole number"),
        ("!set temperature=-1", "temperature must be 0 or more"),
        ("!set temperature=nan", "temperature must be 0 or more"),
        ("!set max_new_tokens=100000", None),
    ],
)
def test_bad_lines_are_said_and_change_nothing(talk, monkeypatch, line, says):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    terminal = Terminal(talk, "tiny")
    before = dict(vars(talk.settings))
    if says is None:
        terminal.handle(line)
        line, says = "hello", "more than the 4096 that this model can see"
    with pytest.raises(UserError, match=says):
        terminal.handle(line)
    if line != "hello":
        assert vars(talk.settings) == before
    assert talk.turns == []


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["-p", " "], "the prompt is empty"),
        (["-p", "x", "--image", "no.png"], "--image: cannot read no.png: No such file"),
        (["-p", "x", "--image", "{}/broken.png"], "cannot decode the image"),
        (["-p", "x", "--audio", "{}/empty.wav"], "is empty (0 bytes)"),
        (["-p", "x", "--audio", "{}/broken.png"], "cannot decode the sound"),
        (["-p", "x", "--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["-p", "x", "--seed", "-1"], "seed must be between"),
        (["-p", "x", "--temperature", "x"], "invalid float value"),
    ],
)
def test_bad_arguments_are_one_line(folder, files, monkeypatch, capsys, args, says):
    status, out, err = run(monkeypatch, capsys, [], folder, *(arg.replace("{}", str(files)) for arg in args))
    assert (status, out) == (2, "")
    assert says in err and err.count("\n") == 1 and err.startswith("unimoe: error: ")


def test_what_is_no_model_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    configs = {
        "gpt": '{"model_type": "gpt2"}',
        "list": "[]",
        "broken": "{",
        "unimoe": '{"model_type": "unimoe"}',
    }
    for name, content in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    (tmp_path / "expert").mkdir()
    (tmp_path / "expert" / "expert.json").write_text("{}")
    for name, says in {
        "file": "is a file",
        "empty": "has no config.json",
        "gpt": "type 'gpt2', expected 'unimoe'",
        "list": "cannot be read",
        "broken": "cannot be read",
        "unimoe": "cannot be loaded",
        "expert": "holds one expert",
        "nothing": "does not exist",
    }.items():
        with pytest.raises(UserError, match=says) as caught:
            load_model(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_active_parameters_leave_out_the_experts_not_chosen(built):
    total, active = count_parameters(built[0])
    experts = sum(p.numel() for name, p in built[0].named_parameters() if ".experts." in name)
    assert total - active == experts // 2


@pytest.mark.slow
def test_in_a_process_of_its_own(folder, files):
    command = [sys.executable, "-P", "-m", "unimoe", "chat", str(folder), "--max-new-tokens", "4"]
    lines = "hello\n!image nowhere.png\nbye\n"
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0
    assert done.stderr == "unimoe: error: !image: cannot read nowhere.png: No such file or directory\n"
    command += ["--audio", str(files / "q.wav")]
    one = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert (one.returncode, one.stderr) == (0, "")
