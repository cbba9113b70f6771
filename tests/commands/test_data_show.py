"""``unimoe data show``: the tokens of the page are those of the batch, and the learned ones are marked."""

import json
import re

import numpy as np
import pytest
import soundfile
from PIL import Image

from unimoe.commands import main as cli
from unimoe.commands.data_show import _media, draw, shown
from unimoe.data import Collator, Sample, parse_record
from unimoe.model.configuration import IGNORED
from unimoe.testing import save_tiny_llm, tiny_model


def record(question, answer, **media):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **media}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (600, 400), "red").save(tmp_path / "a.png")
    soundfile.write(tmp_path / "a.wav", 0.1 * np.ones(8000), 16000)
    lines = [
        record("<image>\nWhat <b>is</b> it?", "Schön 🐞.", images=["a.png"]),
        record("<speech>", "So.", speeches=["a.wav"]),
        *(record(f"Question {n}", "Yes.") for n in range(9)),
    ]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def test_the_page(folder, capsys):
    llm = save_tiny_llm(folder / "llm")
    page = folder / "page.html"
    arguments = [str(folder / "set.jsonl"), "--model", str(llm), "--output", str(page), "--count", "4"]
    assert cli.main(["data", "show", *arguments]) == 0
    assert "4 of 11 samples" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert text.count("<article>") == 4 and text.count("data:image/jpeg") == 1 and text.count("<audio") == 1
    marked = re.findall(r'class="t  ?learned" title="[\d ]+">(.*?)</span>', text)
    assert "".join(marked).startswith("Schön 🐞.") and "&lt;" in text and "<b>" not in text
    assert cli.main(["data", "show", str(folder / "set.jsonl"), "--count", "0"]) == 2


def test_faulty_samples_are_skipped_and_the_exit_status_says_so(folder, capsys):
    llm = save_tiny_llm(folder / "llm")
    (folder / "a.png").write_bytes(b"no image")
    with (folder / "set.jsonl").open("a") as file:
        file.write('\n{"messages": 3}\n{"half": \n')
    page = folder / "page.html"
    arguments = [str(folder / "set.jsonl"), "--model", str(llm), "--output", str(page), "--count", "11"]
    assert cli.main(["data", "show", *arguments]) == 1
    said = capsys.readouterr().out
    assert "10 of 11 samples" in said and page.read_text(encoding="utf-8").count("<article>") == 10
    skipped = [line.partition("set.jsonl:")[2] for line in said.splitlines() if line.startswith("skipped: ")]
    assert [line.partition(":")[0] for line in skipped] == ["12", "13", "1"]
    assert "cannot decode the image" in skipped[2] and "cannot decode" in page.read_text(encoding="utf-8")


def test_tokens_of_a_sample_are_those_of_its_batch(folder):
    _, processor = tiny_model(folder)
    sample = parse_record(record("<image>\nWhat is it?", "Ein Käfer 🐞.", images=["a.png"]), "f:1", folder)
    collator = Collator(processor)
    page, batch = shown(sample, collator), collator([sample])
    ids = [part for token in page.tokens for part in token.ids.split() * token.times]
    assert list(map(int, ids)) == batch["input_ids"][0].tolist()
    assert page.length == len(ids) and page.learned == int((batch["labels"] != IGNORED).sum())
    assert "".join(t.text for t in page.tokens if t.learned) == "Ein Käfer 🐞.<|im_end|>"
    assert [(t.text, t.times) for t in page.tokens if t.times > 1] == [("<image>", 4)]


def test_of_long_audio_only_the_beginning_is_read(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(5 * 16000), 16000)
    part = {"type": "audio", "path": str(path)}
    assert _media(part, "f:1").name == f"{path}, 5.0 s"
    monkeypatch.setattr("unimoe.commands.data_show._LONGEST", 2.0)
    assert _media(part, "f:1").name == f"{path}, 2.0 s or more"


def test_every_modality_is_drawn_in_turn():
    samples = [Sample([], f"f:{n}") for n in range(50)]
    with_picture = Sample([{"role": "user", "content": [{"type": "image"}]}], "f:50")
    drawn = draw([*samples, with_picture], 5, seed=1)
    assert len(drawn) == 5 and with_picture in drawn
    assert drawn == draw([*samples, with_picture], 5, seed=1) != draw([*samples, with_picture], 5, seed=2)
