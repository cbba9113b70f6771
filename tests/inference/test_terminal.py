"""Talking to a tiny random model: one-shot answers, the loop over lines, commands, and what goes wrong."""

import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from PIL import Image
from transformers import TextStreamer

from unimoe.commands import main as cli
from unimoe.compress.decoding import Decoding
from unimoe.errors import UserError
from unimoe.inference.conversation import Conversation, Settings
from unimoe.inference.generate import generate
from unimoe.inference.terminal import Terminal
from unimoe.model.loading import load_model
from unimoe.model.utils import count_parameters


@pytest.fixture(scope="module")
def built(tiny_folder):
    return load_model(tiny_folder)


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


def test_one_shot_prints_only_the_answer(tiny_folder, files, built, monkeypatch, capsys):
    args = ["-p", "What is this?", "--image", files / "a b.png", "--max-new-tokens", 6]
    status, out, err = run(monkeypatch, capsys, [], tiny_folder, *args)
    model, processor = built
    parts = [{"type": "image", "path": files / "a b.png"}, {"type": "text", "text": "What is this?"}]
    asked = [{"role": "user", "content": parts}]
    batch = processor.apply_chat_template(asked, tokenize=True, add_generation_prompt=True)
    assert (status, out.strip(), err) == (0, generate(model, processor, batch, 6)[0], "")


def test_settings_of_the_experts_reach_the_answer(tiny_folder, built, monkeypatch, capsys):
    args = ["-p", "hello", "--max-new-tokens", 6]
    flags = ["--contrast", 0.5, "--rewire", 2, "--experts", 1, "--skip", "image=0.5,text=0.2"]
    model, processor = built
    asked = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    batch = processor.apply_chat_template(asked, tokenize=True, add_generation_prompt=True)
    wanted = Decoding({"image": 0.5, "text": 0.2}, experts=1, contrast=0.5, rewire=2)
    status, out, err = run(monkeypatch, capsys, [], tiny_folder, *args, *flags)
    assert (status, out.strip(), err) == (0, generate(model, processor, batch, 6, decoding=wanted)[0], "")


def test_sound_alone_is_the_message(tiny_folder, files, monkeypatch, capsys):
    args = ["--speech", files / "q.wav", "--max-new-tokens", 4]
    status, out, err = run(monkeypatch, capsys, ["never read"], tiny_folder, *args)
    assert (status, err) == (0, "")
    assert out.count("\n") >= 1


def test_every_line_is_a_message_until_the_input_ends(tiny_folder, files, monkeypatch, capsys):
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
    status, out, err = run(monkeypatch, capsys, lines, tiny_folder)
    assert status == 0
    assert asked == [("what?", 1), ("and <image>?", 1)]  # this stand-in takes no attachment away
    assert err.splitlines() == ["unimoe: error: !image: cannot read no.png: No such file or directory"]


def test_an_interrupted_answer_is_kept_as_far_as_it_came(talk, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    put, tokens = TextStreamer.put, []

    def stop(self, value):
        put(self, value)
        tokens.append(value)
        if len(tokens) == 4:  # the prompt and three tokens
            raise KeyboardInterrupt

    whole = talk.ask("hello", lambda words: None)
    talk.clear()
    monkeypatch.setattr(TextStreamer, "put", stop)
    Terminal(talk, "tiny").handle("hello")
    out = capsys.readouterr().out
    assert out.endswith(" [stopped]\n")
    kept = talk.turns[-1]["content"][0]["text"]
    assert kept and whole.startswith(kept) and len(kept) < len(whole)
    assert out.startswith(kept)


def test_commands(talk, files, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    terminal = Terminal(talk, "tiny")
    terminal.handle(f"!image {files / 'a b.png'}")
    terminal.handle("!speech '" + str(files / "q.wav") + "'")
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
        ("!say x", "unknown command !say"),
        ("!save", "expected a file"),
        ("!save x.json", "nothing to save yet"),
        ("!load /nowhere.json", "there is no data file /nowhere.json"),
        ("!experts", "no answer yet"),
        ("!experts 3", "expected nothing or the word layers"),
        ("!attach /nowhere.png", "cannot read /nowhere.png"),
        ("!set speed=3", "expected name=value"),
        ("!set seed", "expected name=value"),
        ("!set seed=x", "found 'x', expected a whole number"),
        ("!set temperature=-1", "temperature must be 0 or more"),
        ("!set temperature=nan", "temperature must be 0 or more"),
        ("!set experts=3", "experts is 3, expected at most the router's 2"),
        ("!set skip=vidoe=0.1", "found the modality 'vidoe'"),
        ("!set contrast=-1", "contrast is -1.0, expected 0 to 10"),
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
        (["-p", "x", "--speech", "{}/empty.wav"], "is empty (0 bytes)"),
        (["-p", "x", "--speech", "{}/broken.png"], "cannot decode the audio"),
        (["-p", "x", "--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["-p", "x", "--seed", "-1"], "the seed is -1, expected a number from 0 to 4294967295"),
        (["-p", "x", "--temperature", "x"], "invalid float value"),
        (["-p", "x", "--skip", "image"], "expected MODALITY=THRESHOLD"),
        (["-p", "x", "--experts", "3"], "--experts is 3, expected at most the router's 2"),
    ],
)
def test_bad_arguments_are_one_line(tiny_folder, files, monkeypatch, capsys, args, says):
    status, out, err = run(
        monkeypatch, capsys, [], tiny_folder, *(arg.replace("{}", str(files)) for arg in args)
    )
    assert (status, out) == (2, "")
    assert says in err and err.count("\n") == 1 and err.startswith("unimoe: error: ")


def test_a_session_is_saved_shown_and_taken_up(tiny_folder, files, monkeypatch, capsys):
    saved = files / "talk.json"
    lines = [f"!attach '{files / 'a b.png'}'", "what is it?", f"!save {saved}", "!experts", "!experts layers"]
    status, out, err = run(monkeypatch, capsys, lines, tiny_folder, "--max-new-tokens", 5)
    assert (status, err) == (0, "")
    answer = json.loads(saved.read_text())["messages"][-1]["content"][0]["text"]
    assert answer in out and "saved 2 turns" in out
    assert re.search(r"tokens of the last prompt and its answer: \d+ text, 4 image, 4 answer", out)
    assert re.search(r"^  image +\d+ % +\d+ % +\d+ % +\d+ %$", out, re.M) and "image, by decoder layer" in out
    lines = ["!history", "and now?", "!history"]
    status, out, err = run(monkeypatch, capsys, lines, tiny_folder, "--session", saved, "--max-new-tokens", 5)
    assert (status, err) == (0, "")
    assert out.startswith(f"> [image {files / 'a b.png'}] what is it?\n{answer}\n")
    assert "> and now?\n" in out


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
def test_in_a_process_of_its_own(tiny_folder, files):
    """Nothing but errors on stderr; a conversation, and one question about a sound."""
    code = """
import sys
from unimoe.commands.main import main
folder, sound = sys.argv[1:]
print("codes", main(["chat", folder, "--max-new-tokens", "4"]),
      main(["chat", folder, "--max-new-tokens", "4", "--speech", sound]))
"""
    command = [sys.executable, "-P", "-c", code, str(tiny_folder), str(files / "q.wav")]
    lines = "hello\n!image nowhere.png\nbye\n"
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "codes 0 0"
    assert done.stderr == "unimoe: error: !image: cannot read nowhere.png: No such file or directory\n"
