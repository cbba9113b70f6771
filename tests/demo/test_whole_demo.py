"""The shipped configurations, end to end, on a tiny random LLM and encoders: the real thing in miniature."""

import json
from pathlib import Path

import pytest
import yaml

from unimoe.commands import main as cli
from unimoe.demo import run as subject
from unimoe.demo import steps
from unimoe.synthetic.multimodal import BuildConfig, build_data
from unimoe.testing import IMAGE, SPEECH, VIDEO, save_tiny_llm

SMALL = BuildConfig(
    views=1, counts=4, pairs=4, test_views=1, test_questions=1, speeds=(1.0,), videos=4, sounds=12
)


@pytest.fixture
def miniature(tiny_parts, tmp_path, monkeypatch):
    """Tiny parts, two steps a stage, sprites that are squares, photos that are grey, and few samples."""
    llm = save_tiny_llm(tmp_path / "llm")
    shipped = Path(str(steps.files("unimoe.configs").joinpath("uni_moe")))
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

    def build(folder, seed, unseen_artist, extended):
        parts = (tiny_parts / "sprites", tiny_parts / "photos", unseen_artist)
        build_data(folder, seed, SMALL, *parts, extended)
        for file in folder.glob("*.jsonl"):
            file.write_text("".join(file.read_text().splitlines(keepends=True)[:6]))

    monkeypatch.setattr(steps, "files", lambda package: tmp_path / "configs")
    monkeypatch.setattr(steps, "fault", lambda part, cache: None)
    monkeypatch.setattr(
        subject, "default_part", lambda part: tiny_parts / {"artist": "sprites"}.get(part, part)
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
@pytest.mark.timeout(1500)
def test_the_extended_demo_in_miniature(miniature, capsys):
    pytest.importorskip("av")
    output = miniature / "extended"
    assert cli.main(["demo", "--extended", "--control", "--output", str(output)]) == 0
    report = json.loads((output / "report.json").read_text())
    for model in ("moe", "dense", "start"):
        for key in ("new_backgrounds", "speech", "videos", "sounds", "sounds_asked", "spoken_questions"):
            assert isinstance(report["models"][model][key], float)
    assert {"text", "image", "video", "speech", "audio"} <= set(report["load"])
    assert len(report["load"]["all"][0]) == 5
    assert "data:video/mp4" in (output / "report.html").read_text()
    out = capsys.readouterr().out
    commands = [line.split()[2:] for line in out.splitlines() if line.strip().startswith("unimoe chat")]
    video = next(command for command in commands if "--video" in command)
    assert cli.main(["chat", *video[:3], "-p", "What?", "--max-new-tokens", "4"]) == 0
    assert cli.main(["demo", "--output", str(output)]) == 2  # begun as the extended one
