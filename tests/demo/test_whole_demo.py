"""The shipped configurations, end to end, on a tiny random LLM and encoders: the real thing in miniature."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from unimoe import cli
from unimoe.data.concepts import HELD_OUT, TRAINED
from unimoe.demo import run as subject
from unimoe.demo.build import BuildConfig, build_data
from unimoe.testing import IMAGE, SPEECH, VIDEO, save_tiny_llm

SMALL = BuildConfig(
    views=1, counts=4, pairs=4, test_views=1, test_questions=1, speeds=(1.0,), films=4, sounds=12
)


@pytest.fixture
def miniature(tmp_path, monkeypatch):
    """Tiny parts, two steps a stage, sprites that are squares, photos that are noise, and few samples."""
    llm = save_tiny_llm(tmp_path / "llm")
    shipped = Path(str(subject.files("unimoe.configs").joinpath("uni_moe")))
    (tmp_path / "configs" / "uni_moe").mkdir(parents=True)
    (tmp_path / "configs" / "uni_moe" / "extended").mkdir()
    for path in (*shipped.glob("*.yaml"), *shipped.glob("extended/*.yaml")):
        content = yaml.safe_load(path.read_text())
        if "llm" in content.get("model", {}):
            content["model"] |= {"llm": str(llm), "modalities": {"image": IMAGE, "speech": SPEECH}}
        if path.stem == "align_more":
            video = {**VIDEO, "connector": {**IMAGE["connector"], "weights": "image"}}
            audio = {**SPEECH, "connector": {**SPEECH["connector"], "depth": 1}}
            content["model"]["modalities"] = {"video": video, "audio": audio}
        if "data" in content:
            content["data"] |= {"steps": 2, "train": dict.fromkeys(content["data"]["train"], 1)}
        (tmp_path / "configs" / "uni_moe" / path.relative_to(shipped)).write_text(yaml.safe_dump(content))

    noise = np.random.default_rng(0)
    (tmp_path / "sprites").mkdir()
    (tmp_path / "photos").mkdir()
    for concept in TRAINED + HELD_OUT:
        color = tuple(noise.integers(0, 255, 3).tolist())
        Image.new("RGBA", (72, 40), (*color, 255)).save(tmp_path / "sprites" / f"{ord(concept.char):x}.png")
    for index in range(6):
        pixels = noise.integers(0, 255, (120, 140, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"p{index}.png")

    words = {"[PAD]": 0, "[UNK]": 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]").save_pretrained(tmp_path / "text")
    size: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    BertModel(BertConfig(vocab_size=len(words), **size)).save_pretrained(tmp_path / "text")

    def build(folder, seed, unseen_artist, extended):
        parts = (tmp_path / "sprites", tmp_path / "photos", unseen_artist)
        build_data(folder, seed, SMALL, *parts, extended)
        for file in folder.glob("*.jsonl"):
            file.write_text("".join(file.read_text().splitlines(keepends=True)[:6]))

    monkeypatch.setattr(subject, "files", lambda package: tmp_path / "configs")
    monkeypatch.setattr(subject, "fault", lambda part, cache: None)
    monkeypatch.setattr(
        subject, "default_part", lambda part: tmp_path / {"artist": "sprites"}.get(part, part)
    )
    monkeypatch.setattr(subject, "build_data", build)
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_demo_in_miniature(miniature, capsys, monkeypatch):
    output = miniature / "demo"
    assert cli.main(["demo", "--output", str(output)]) == 0
    report = json.loads((output / "report.json").read_text())
    assert set(report["models"]) == {"moe", "start"}
    for scores in report["models"].values():
        for key in ("new_backgrounds", "unseen_artist", "text_questions", "spoken_questions", "perplexity"):
            assert isinstance(scores[key], float)
    assert report["load"]["layers"] and {"text", "image", "speech"} <= set(report["load"])
    assert report["parameters"]["active"] < report["parameters"]["total"]
    assert {"align", "expert_image", "expert_speech", "assemble", "moe"} <= set(report["seconds"])
    assert (output / "report.html").read_text().count("data:audio/flac") >= 4
    out = capsys.readouterr().out
    commands = [line.split()[2:] for line in out.splitlines() if line.strip().startswith("unimoe chat")]
    assert len(commands) == 2
    assert cli.main(["chat", *commands[1], "--max-new-tokens", "4"]) == 0

    before = {path: path.stat().st_mtime for path in output.rglob("stage.json")}
    monkeypatch.setattr(subject, "build_data", None)
    assert cli.main(["demo", "--output", str(output), "--control"]) == 0
    assert set(json.loads((output / "report.json").read_text())["models"]) == {"moe", "dense", "start"}
    assert before.items() <= {path: path.stat().st_mtime for path in output.rglob("stage.json")}.items()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_extended_demo_in_miniature(miniature, capsys):
    pytest.importorskip("av")
    output = miniature / "extended"
    assert cli.main(["demo", "--extended", "--control", "--output", str(output)]) == 0
    report = json.loads((output / "report.json").read_text())
    for model in ("moe", "dense", "start"):
        for key in ("new_backgrounds", "speech", "films", "sounds", "sounds_asked", "spoken_questions"):
            assert isinstance(report["models"][model][key], float)
    assert {"text", "image", "video", "speech", "audio"} <= set(report["load"])
    assert len(report["load"]["all"][0]) == 5
    out = capsys.readouterr().out
    commands = [line.split()[2:] for line in out.splitlines() if line.strip().startswith("unimoe chat")]
    film = next(command for command in commands if "--video" in command)
    assert cli.main(["chat", *film[:3], "-p", "What?", "--max-new-tokens", "4"]) == 0
    assert cli.main(["demo", "--output", str(output)]) == 2  # begun as the extended one
