"""Scenes: same seed same bytes, boxes and masks that are true of the pictures, splits that share nothing."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from unimoe.errors import UserError
from unimoe.synthetic.concepts import HELD_OUT, TRAINED
from unimoe.synthetic.detection_scenes import (
    MOST_SEEN,
    SceneConfig,
    build_scenes,
    compose,
    seen_concepts,
    unseen_concepts,
)
from unimoe.synthetic.more_concepts import MORE_HELD_OUT, MORE_TRAINED
from unimoe.synthetic.sprites import FolderArtist

SMALL = SceneConfig(images=6, test_images=3, size=96, concepts=8, crowded=0.5)


def parts(tiny_parts: Path) -> tuple[Path, Path, Path]:
    """Sprites, photos, and the sprites again as those of another artist."""
    return tiny_parts / "sprites", tiny_parts / "photos", tiny_parts / "sprites"


@pytest.fixture(scope="module")
def built(tiny_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    return build_scenes(folder / "set", SMALL, *parts(tiny_parts))


def test_same_seed_same_bytes(tiny_parts: Path, built: Path, tmp_path: Path):
    again = build_scenes(tmp_path / "again", SMALL, *parts(tiny_parts))
    first = {p.relative_to(built): p.read_bytes() for p in built.rglob("*") if p.is_file()}
    second = {p.relative_to(again): p.read_bytes() for p in again.rglob("*") if p.is_file()}
    assert first == second and len(first) == 6 + 4 * 3 + 6


def test_boxes_are_the_extents_of_masks_that_do_not_overlap(built: Path, capsys):
    for split in ("train", "unseen_concepts"):
        coco = COCO(built / f"{split}.json")
        for image in coco.loadImgs(coco.getImgIds()):
            cover = np.zeros((image["height"], image["width"]), int)
            for entry in coco.loadAnns(coco.getAnnIds(image["id"])):
                mask = coco.annToMask(entry)
                x, y, width, height = entry["bbox"]
                rows, columns = np.nonzero(mask)
                assert (columns.min(), rows.min()) == (x, y)
                assert (columns.max() + 1, rows.max() + 1) == (x + width, y + height)
                assert entry["area"] == mask.sum()
                cover += mask
            assert cover.max() == 1


def test_masks_follow_the_pixels_and_hide_little(tiny_parts: Path):
    """Everything coloured is inside a mask, everything inside a mask is coloured (up to the soft edge)."""
    artist, photo = FolderArtist(tiny_parts / "sprites"), Image.new("RGB", (128, 128), (128, 128, 128))
    config = SceneConfig(size=128, crowded=1.0, scale=(0.4, 0.6))
    for seed in range(5):
        picture, objects = compose(TRAINED, artist, photo, config, random.Random(seed))
        pixels = np.asarray(picture).astype(int)
        coloured = np.ptp(pixels, axis=2) > 60
        inside = np.logical_or.reduce([mask for _, mask in objects])
        assert (coloured & ~inside).sum() == 0
        assert (inside & ~coloured).sum() < 0.25 * inside.sum()
        assert len(objects) >= 3


def test_splits_share_neither_concepts_nor_photos(built: Path):
    manifest = json.loads((built / "manifest.json").read_text())
    concepts, photos = manifest["concepts"], manifest["photos"]
    assert len(concepts["seen"]) == 8 and not set(concepts["seen"]) & set(concepts["unseen"])
    assert photos["unseen"] and not set(photos["seen"]) & set(photos["unseen"])
    wanted_by_split = {"train": "seen", "unseen_backgrounds": "seen"}
    wanted_by_split |= {"unseen_concepts": "unseen", "unseen_artist": "unseen"}
    for split, wanted in wanted_by_split.items():
        names = [c["name"] for c in json.loads((built / f"{split}.json").read_text())["categories"]]
        assert names == concepts[wanted]


def test_tests_of_fewer_seen_and_more_unseen_concepts(tiny_parts: Path, tmp_path: Path):
    assert seen_concepts(MOST_SEEN) == [*TRAINED, *MORE_TRAINED] and len(set(seen_concepts(300))) == 300
    assert set(seen_concepts(50)) < set(TRAINED) < set(seen_concepts(300))
    assert unseen_concepts() == [*HELD_OUT, *MORE_HELD_OUT] and unseen_concepts(12) == list(HELD_OUT)
    config = SceneConfig(images=2, test_images=2, size=64, concepts=8, tested=2, unseen=3)
    folder = build_scenes(tmp_path / "set", config, *parts(tiny_parts))
    counts = {"train": 8, "val": 2, "unseen_backgrounds": 2, "unseen_concepts": 3, "unseen_artist": 3}
    for split, count in counts.items():
        assert len(json.loads((folder / f"{split}.json").read_text())["categories"]) == count


def test_without_another_artist_its_split_is_left_out(tiny_parts: Path, tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setenv("UNIMOE_CACHE", str(tmp_path / "empty"))
    config = SceneConfig(images=1, test_images=1, size=64, concepts=2)
    folder = build_scenes(tmp_path / "set", config, *parts(tiny_parts)[:2])
    assert not list(folder.glob("unseen_artist*")) and "no images of unseen_artist" in caplog.text


def test_wrong_settings_and_folders_that_hold_other_things(tmp_path: Path):
    for wrong in ({"images": 0}, {"size": 10}, {"concepts": 1000}, {"tested": 80}, {"unseen": 99}):
        with pytest.raises(UserError, match="--" + next(iter(wrong))):
            SceneConfig(**wrong)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a data set of scenes"):
        build_scenes(tmp_path)
