import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from unimoe.errors import UserError
from unimoe.testing import tiny_model

FILE = Path(__file__).parents[2] / "benchmarks" / "uni_moe_study.py"
SMALL = ["--expert-steps", "1", "--steps", "1", "--questions", "2", "--seeds", "0", "--keep"]
IMAGE_TESTS = ("test.new_backgrounds", "test.text_questions")
COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("benchmarks_uni_moe_study", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def demo(tmp_path):
    """A demo's folder in miniature: a tiny model for the aligned one, three samples a file."""
    folder = tmp_path / "demo"
    (folder / "data").mkdir(parents=True)
    model, processor = tiny_model(tmp_path)
    model.save_pretrained(folder / "align")
    processor.save_pretrained(folder / "align")
    media = {"image": [], "speech": []}
    for index, colour in enumerate(COLOURS):
        media["image"].append({"type": "image", "path": f"{colour}.png"})
        media["speech"].append({"type": "speech", "path": f"{colour}.wav"})
        Image.new("RGB", (64, 64), colour).save(folder / "data" / f"{colour}.png")
        noise = np.random.default_rng(index).normal(size=3000)
        soundfile.write(folder / "data" / f"{colour}.wav", 0.1 * noise, 16000)
    kinds = {
        ("image",): ("train.image", "train.questions", "train.positions", *IMAGE_TESTS),
        ("image", "speech"): ("train.spoken", "test.spoken_questions"),
        ("speech",): ("train.transcribe", "val.transcribe"),
        (): ("train.text",),
    }
    for parts, files in kinds.items():
        lines = []
        for index, colour in enumerate(COLOURS):
            asked = [*(media[part][index] for part in parts), {"type": "text", "text": "?"}]
            answer = [{"type": "text", "text": colour}]
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            lines.append(json.dumps({"messages": turns}) + "\n")
        for file in files:
            (folder / "data" / f"{file}.jsonl").write_text("".join(lines))
    return folder


def test_every_row_trains_on_as_many_samples(study):
    mixes = study.MIXES
    assert {sum(mix.values()) for mix in mixes.values()} == {12}
    both = {**mixes["images"], **mixes["speech"]}  # a step of each, against two steps of both
    assert both == {file: 2 * count for file, count in mixes["both"].items()}


def test_rows_are_made_scored_and_not_made_twice(study, demo, tmp_path, capsys, monkeypatch):
    where = ["--demo", str(demo), "--output", str(tmp_path / "study"), *SMALL]
    names = ["specialised, balance", "dense"]
    found = study.main([*where, "--cells", *names])
    assert [run["cell"] for run in found["runs"]] == names
    for run in found["runs"]:
        assert set(run["sets"]) == {"images", "written", "spoken", "speech"} and run["perplexity"] > 1
        assert all(part["count"] == 2 and part["loss"] > 0 for part in run["sets"].values())
    assert "specialised, balance       1" in capsys.readouterr().out
    work = tmp_path / "study" / "seed-0"
    assert {path.name for path in work.iterdir() if path.is_dir()} == {
        "expert-images-interval",
        "expert-speech-interval",
        "dense-both-interval",
    }
    steps = [json.loads((path / "stage.json").read_text())["steps"] for path in sorted(work.glob("*/"))]
    assert steps == [2, 1, 1]  # the dense model's first phase is as long as both specialists'
    monkeypatch.setattr(study.Study, "run", None)
    assert study.main([*where, "--cells", *names])["runs"] == found["runs"]
    with pytest.raises(UserError, match="was started with steps 1, found 2"):
        study.main([*where, "--steps", "2"])


def test_the_recipes_differ_in_what_the_row_says(study, demo, tmp_path, monkeypatch):
    made, assembled = [], []
    monkeypatch.setattr(
        study.Study, "fit", lambda self, recipe: made.append(recipe) or Path(recipe["output"])
    )
    monkeypatch.setattr(
        study, "assemble", lambda path: assembled.append(study.yaml.safe_load(Path(path).read_text()))
    )
    one = study.Study(demo, tmp_path / "study", 3, (5, 4), 2)
    one.moe(study.CELLS["copies, top-1"], tmp_path / "phase2")
    one.moe(study.CELLS["second half"], tmp_path / "phase2")
    copies, half = assembled
    assert {slot["from"] for slot in copies["experts"]} == {"base"} and "dense-both" in copies["base"]
    assert copies["moe"]["top_k"] == 1 and copies["moe"]["renormalize"] is False and copies["seed"] == 3
    assert [Path(slot["from"]).name for slot in half["experts"]] == [
        "base",
        "expert-images-second_half",
        "expert-speech-second_half",
        "base",
    ]
    assert made[1]["model"]["lora"][0]["match"] == ["*layers.1.mlp.*"]  # of two layers
    assert [recipe["data"]["steps"] for recipe in made] == [10, 5, 5]


def test_a_table_of_means_and_spreads(study):
    def run(cell, accuracy):
        sets = {name: {"accuracy": accuracy, "loss": 1.0} for name in study.SETS}
        return {"cell": cell, "sets": sets, "perplexity": 30.0}

    head, first, second = study.summary([run("a", 0.2), run("b", 0.5), run("a", 0.4)])
    assert head.split() == ["seeds", *study.SETS, "mean", "loss", "perplexity"]
    assert "30.00 ± 14.14" in first and first.startswith("a") and "±" not in second
