"""Scenes: same seed same bytes, boxes and masks that are true of the pictures, splits that share nothing."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from unimoe.errors import UserError
from unimoe.synthetic.concepts import TRAINED
from unimoe.synthetic.detection_scenes import SceneConfig, build_scenes, compose
from unimoe.synthetic.sprites import FolderArtist

SMALL = SceneConfig(images=6, test_images=3, size=96, concepts=8, crowded=0.5)


@pytest.fixture(scope="module")
def built(tiny_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    return build_scenes(folder / "set", SMALL, tiny_parts / "sprites", tiny_parts / "photos")


def test_same_seed_same_bytes(tiny_parts: Path, built: Path, tmp_path: Path):
    again = build_scenes(tmp_path / "again", SMALL, tiny_parts / "sprites", tiny_parts / "photos")
    first = {p.relative_to(built): p.read_bytes() for p in built.rglob("*") if p.is_file()}
    second = {p.relative_to(again): p.read_bytes() for p in again.rglob("*") if p.is_file()}
    assert first == second and len(first) == 6 + 3 * 3 + 5


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
    for split, wanted in (("train", "seen"), ("unseen_backgrounds", "seen"), ("unseen_concepts", "unseen")):
        names = [c["name"] for c in json.loads((built / f"{split}.json").read_text())["categories"]]
        assert names == concepts[wanted]


def test_wrong_settings_and_folders_that_hold_other_things(tmp_path: Path):
    for wrong in ({"images": 0}, {"size": 10}, {"concepts": 1000}):
        with pytest.raises(UserError, match="--" + next(iter(wrong))):
            SceneConfig(**wrong)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a data set of scenes"):
        build_scenes(tmp_path)
