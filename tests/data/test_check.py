"""``unimoe data check`` on conversations: every planted fault is found at its line, and nothing else."""

import base64
import io
import json
import random
from collections import Counter

import numpy as np
import pytest
import soundfile
from PIL import Image

from unimoe.commands import main as cli
from unimoe.data import check, read_samples, write_samples
from unimoe.data.check import check_conversations


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    for number in range(5):
        (folder / f"{number}.png").write_bytes(png((number, 0, 0)))
        soundfile.write(folder / f"{number}.wav", 0.1 * np.ones(800 + number), 16000)
    (folder / "half.png").write_bytes(png((9, 9, 9))[:50])
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("no sound")
    return folder


def good(number, rng):
    """A sound record in one of many styles; its text tells it from all others."""
    question, answer = f"Question {number}?", rng.choice(["Yes.", "No, <image> is a word.", "Ünd \u2028 so."])
    style = rng.randrange(5)
    if style == 0:
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "Yes."}]
        return {"id": str(number), "image": f"{number % 5}.png", "conversations": turns}
    if style == 1:
        asked = f"<image><speech> {question} <image>"
        media = {"images": [f"{rng.randrange(5)}.png", f"{rng.randrange(5)}.png"], "speeches": ["1.wav"]}
        return {
            "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "No."}],
            **media,
        }
    if style == 2:
        url = "data:image/png;base64," + base64.b64encode(png((number % 250, 1, 1))).decode()
        asked = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    elif style == 3:
        asked = [{"type": "audio", "path": f"{number % 5}.wav"}, {"type": "text", "text": question}]
    else:
        asked = [{"type": "text", "text": question}]
    said = [{"type": "text", "text": answer}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    if rng.random() < 0.3:
        messages += [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "So."}]
    return {"messages": messages}


def user(*content):
    return {"messages": [{"role": "user", "content": list(content)}, {"role": "assistant", "content": "A."}]}


def plant(kind, number, record, rng):
    """A record with a fault of ``kind``, out of a sound one."""
    text = {"type": "text", "text": f"fault {number}"}
    if kind == "malformed":
        return rng.choice([{"text": "x"}, [record], {"messages": "x"}, {"messages": [{"role": "user"}]}, 5])
    if kind == "missing file":
        return user({"type": "image", "path": f"gone{number}.png"}, text)
    if kind == "remote address":
        return user({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}, text)
    if kind == "data URL":
        url = rng.choice(["data:image/png;base64,??", "data:image/png;base64,AAAAA", "data:image/png"])
        return user({"type": "image", "url": url}, text)
    if kind == "empty file":
        return user({"type": "audio", "path": "empty.wav"}, text)
    if kind == "undecodable":
        name = rng.choice(["half.png", "text.wav"])
        return user({"type": "image" if name.endswith("png") else "speech", "path": name}, text)
    turns = record.get("messages") or record["conversations"]
    said = "content" if "content" in turns[0] else "value"
    if kind == "role":
        turns[0]["role" if said == "content" else "from"] = rng.choice(["narrator", None, 7])
    elif kind == "order":
        again = {**turns[0], said: "Hello?"}
        rng.choice([turns.reverse, turns.pop, lambda: turns.insert(0, again)])()
    elif kind == "empty turn":
        turns[-1][said] = rng.choice(["", " \n", []])
    elif kind == "placeholders":
        turns[0][said] = rng.choice([f"<video> {number}", f"<image><image><image> {number}"])
    return record


PLANTED = [
    "not JSON", "malformed", "role", "order", "empty turn", "placeholders", "missing file", "remote address",
    "data URL", "empty file", "undecodable", "duplicate",
]  # fmt: skip


def lines_with_faults(count, seed, kinds):
    """JSON lines of which 5 % are faulty, and {line number: kind}."""
    rng = random.Random(seed)
    planted = {line: kinds[i % len(kinds)] for i, line in enumerate(rng.sample(range(3, count), count // 20))}
    lines = []
    for number in range(count):
        record, kind = good(number, rng), planted.get(number)
        text = json.dumps(record if kind is None else plant(kind, number, record, rng))
        if kind == "not JSON":
            text = text[: rng.randrange(1, len(text) - 1)]
        if kind == "duplicate":
            text = lines[rng.choice([n for n in range(number) if n not in planted])]
        lines.append(text)
    return lines, {number + 1: kind for number, kind in planted.items()}


@pytest.mark.parametrize("seed", [0, 1])
def test_every_planted_fault_is_named_with_its_line_and_no_other(folder, seed):
    lines, planted = lines_with_faults(1200, seed, PLANTED)
    path = folder / "faulty.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    report = check_conversations(path)
    assert len(planted) == 60
    assert {fault.where: fault.kind for fault in report.faults} == {
        f"{path}:{n}": k for n, k in planted.items()
    }
    assert len(report.faults) == 60 and report.samples == 1200


def test_faults_of_a_list_have_the_line_of_their_record(folder):
    lines, planted = lines_with_faults(300, 2, PLANTED[1:])
    path = folder / "faulty.json"
    text = json.dumps([json.loads(line) for line in lines], indent=2)
    path.write_text(text, encoding="utf-8")
    report = check_conversations(path)
    found = {fault.where: fault.kind for fault in report.faults}
    assert sorted(found.values()) == sorted(planted.values())
    for where, kind in found.items():
        index, line = (
            int("".join(filter(str.isdigit, part))) for part in where.rpartition("[")[2].split("]")
        )
        assert planted[index + 1] == kind
        head = text.split("\n")[line - 1]
        assert head == "  " + json.dumps(json.loads(lines[index]), indent=2)[0] or head.strip() == "5,"


def test_sound_files_of_every_format_have_no_faults(folder):
    rng = random.Random(3)
    path = folder / "sound.jsonl"
    path.write_text("\n".join(json.dumps(good(number, rng)) for number in range(200)))
    samples = read_samples(path)
    for name in ("sound.jsonl", "sound.parquet", "sound.tar"):
        if name != path.name:
            write_samples(folder / name, samples)
        report = check_conversations(folder / name)
        assert not report.faults
        assert report.modalities == Counter(sample.modality for sample in samples)


def test_a_cut_shard_is_a_fault_and_what_is_whole_is_checked(folder):
    write_samples(folder / "cut.tar", read_samples_of(folder, 50))
    content = (folder / "cut.tar").read_bytes()
    (folder / "cut.tar").write_bytes(content[: len(content) // 2])
    report = check_conversations(folder / "cut.tar")
    assert [fault.kind for fault in report.faults][-1] == "truncated" and 15 < report.samples < 35


@pytest.mark.parametrize("content", ["", "\n", "[]"])
def test_a_file_without_samples_is_a_fault(tmp_path, capsys, content):
    path = tmp_path / "none.jsonl"
    path.write_text(content)
    assert cli.main(["data", "check", str(path)]) == 1
    assert f"{path}: found no samples, expected at least one" in capsys.readouterr().out


def read_samples_of(folder, count):
    rng = random.Random(4)
    path = folder / "some.jsonl"
    path.write_text("\n".join(json.dumps(good(number, rng)) for number in range(count)))
    return read_samples(path)


def test_whatever_is_wrong_with_one_sample_the_others_are_checked(tmp_path, monkeypatch):
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "x"}]
    lines = [{"messages": turns, "images": [f"{number}.png"]} for number in range(3)]
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png((number, 0, 0)))
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def broken(part, where):
        if part["path"].endswith("1.png"):
            raise ZeroDivisionError("of a codec")

    monkeypatch.setitem(check._DECODE, "image", broken)

    def length(sample):
        if sample.source.endswith(":1"):
            raise KeyError("a template's")
        return 3

    report = check_conversations(tmp_path / "set.jsonl", length=length)
    assert report.samples == 3 and report.tokens["sum"] == 3
    assert [(fault.kind, fault.message) for fault in report.faults] == [
        ("not for the model", 'KeyError: "a template\'s"'),
        ("undecodable", "ZeroDivisionError: of a codec"),
    ]


def test_one_unreadable_file_does_not_end_the_others(tmp_path, capsys):
    write_samples(tmp_path / "b.parquet", [])
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing else")
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}]
    shard = tmp_path / "one.jsonl"
    shard.write_text(json.dumps({"messages": turns}))
    write_samples(tmp_path / "c.parquet", read_samples(shard))
    (tmp_path / "b.parquet").unlink()
    assert cli.main(["data", "check", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "1 samples, 2 turns" in said and "a.parquet: cannot be read as a table" in said
