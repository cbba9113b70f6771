"""The demo's data: same seed same bytes, no leak between splits, answers that are true of the pictures."""

import json
from pathlib import Path

import pytest

from unimoe.data.read import read_samples
from unimoe.errors import UserError
from unimoe.synthetic.concepts import HELD_OUT
from unimoe.synthetic.multimodal import BuildConfig, build_data
from unimoe.synthetic.questions import normalise

SMALL = BuildConfig(views=1, counts=4, pairs=4, test_views=1, test_questions=2, speeds=(1.0,))


def build(folder: Path, parts: Path) -> Path:
    artist = parts / "sprites"
    return build_data(folder, 3, SMALL, artist, parts / "photos", unseen_artist=artist)


@pytest.fixture(scope="module")
def built(tiny_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("demo") / "data", tiny_parts)


def test_same_seed_same_bytes(tiny_parts: Path, built: Path, tmp_path: Path) -> None:
    again = build(tmp_path / "again", tiny_parts)
    first = {p.relative_to(built): p.read_bytes() for p in built.rglob("*") if p.is_file()}
    second = {p.relative_to(again): p.read_bytes() for p in again.rglob("*") if p.is_file()}
    assert first == second


def test_every_file_can_be_read_and_every_medium_is_there(built: Path) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    for name, count in manifest["samples"].items():
        samples = read_samples(built / f"{name}.jsonl", training=False)
        assert len(samples) == count
        assert all(Path(part["path"]).is_file() for sample in samples for part in sample.media())


def test_splits_share_neither_photos_nor_voices_nor_held_out_concepts(built: Path) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    assert not set(manifest["photos"]["train"]) & set(manifest["photos"]["test"])
    assert not set(manifest["voices"]["train"]) & set(manifest["voices"]["test"])
    held_out = {concept.name for concept in HELD_OUT}
    for file in built.glob("train.*.jsonl"):
        text = file.read_text()
        assert "/awb-" not in text
        answers = {
            normalise(json.loads(line)["messages"][-1]["content"][0]["text"]) for line in text.splitlines()
        }
        assert not answers & held_out
    heard = {
        json.loads(line)["speaker"] for line in (built / "test.unseen_voice.jsonl").read_text().splitlines()
    }
    assert heard == {"awb"}


def test_written_and_spoken_tests_ask_the_same(built: Path) -> None:
    sets = []
    for name in ("text_questions", "spoken_questions", "unseen_voice"):
        records = [json.loads(line) for line in (built / f"test.{name}.jsonl").read_text().splitlines()]
        sets.append(
            [(r["question"], r["messages"][0]["content"][0]["path"], r["messages"][1]) for r in records]
        )
    assert sets[0] == sets[1] == sets[2]


def test_both_sides_of_a_pair_are_asked_for(built: Path) -> None:
    lines = (built / "train.positions.jsonl").read_text().splitlines()
    asked: dict[str, dict[str, str]] = {}
    for record in map(json.loads, lines):
        image, answer = (message["content"][0] for message in record["messages"])
        asked.setdefault(image["path"], {})[record["kind"]] = normalise(answer["text"])
        if record["kind"] in ("left", "right"):
            left, right = sorted(record["regions"], key=lambda region: region[1][0])
            assert answer["text"].lower().endswith(f"{(left if record['kind'] == 'left' else right)[0]}.")
    kinds = [set(answers) for answers in asked.values()]
    assert kinds.count({"left", "right"}) == SMALL.pairs and kinds.count({"count"}) == SMALL.counts


def test_colours_are_read_off_the_pixels(built: Path) -> None:
    records = [json.loads(line) for line in (built / "test.text_questions.jsonl").read_text().splitlines()]
    found = {r["messages"][1]["content"][0]["text"] for r in records if r["kind"] == "colour"}
    assert found <= {"Red.", "Blue."}


def test_too_few_photos(tiny_parts: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match="at least 4"):
        build_data(tmp_path / "out", 0, SMALL, tiny_parts / "sprites", tmp_path / "photos")
    assert not (tmp_path / "out").exists()
