from pathlib import Path
from typing import cast

import numpy as np
import pytest
from PIL import Image

from unimoe.applications.adaptation import data as subject
from unimoe.applications.adaptation.data import AdaptationData, ShiftedSet
from unimoe.applications.labelled_images import LabelledImages
from unimoe.errors import UserError


@pytest.fixture
def data(styles) -> AdaptationData:
    found = AdaptationData(**styles["data"])
    found.setup("fit")
    return found


def test_an_episode_is_of_one_domain_and_follows_from_its_number(data):
    assert data.classes == ["blue", "red"] and data.domains == ["a", "b", "c"]
    batch = data.sets["train"].__getitems__([4, 5, 6])
    assert batch.images.shape == (3, 8, 3, 8, 8) and batch.domains.tolist() == [1, 2, 0]
    backgrounds = (batch.images.amin(dim=(3, 4))[:, :, 1] + 1) * 127.5  # green is in no square
    assert batch.labels.float().mean() not in (0, 1) and backgrounds.max() == 0
    corners = batch.images.amax(dim=(3, 4))[:, :, 1]
    assert ((corners + 1) * 127.5).round().unique(dim=1).T.tolist() == [[50, 100, 0]]
    red = batch.images[:, :, 0].amax(dim=(2, 3)) > 0.5
    assert red.equal(batch.labels == 1)
    assert data.sets["train"].__getitems__([5]).images.equal(batch.images[1:2])


def test_a_support_is_not_evaluated(data):
    test = cast(ShiftedSet, data.sets["test"])
    assert [one.name for one in test.domains] == ["e"] and test.trained == [-1] and len(test) == 12
    support = test.support(0)
    batch = test.__getitems__(list(range(12)))
    assert support.shape == (4, 3, 8, 8) and batch.domains.tolist() == [0] * 12
    assert sorted(test.supports[0] + [place for _, place in test.rows]) == list(range(16))


def test_a_small_domain_repeats_images_and_gives_half_to_its_support(styles):
    data = AdaptationData(**{**styles["data"], "support": 20})
    data.setup("fit")
    assert data.sets["train"].__getitems__([0]).labels.shape == (1, 24)
    assert len(cast(ShiftedSet, data.sets["test"]).support(0)) == 8 and len(data.sets["test"]) == 8


def test_artists_take_turns_and_the_known_ones_are_masked(monkeypatch):
    def drawn(artists, side):
        counts = {"train": 8, "val": 2, "test": 3}
        return {
            split: LabelledImages(np.full((n, 3, side, side), artists[0], np.float32), np.arange(n) % 2)
            for split, n in counts.items()
        }

    monkeypatch.setattr(subject, "default_part", list(subject.ARTISTS.values()).index)
    monkeypatch.setattr(subject, "open_artist", lambda number: number)
    monkeypatch.setattr(subject, "draw_sprites", drawn)
    for seed in range(5):
        data = AdaptationData(side=8, support=2, query=2, seed=seed)
        data.setup("fit")
        held_out = list(subject.ARTISTS)[seed % 4]
        val, test = (cast(ShiftedSet, data.sets[split]) for split in ("val", "test"))
        assert [one.name for one in test.domains] == [held_out]
        assert len(test.domains[0].labels) == 13, "all drawings of the fourth"
        assert data.domains == [name for name in subject.ARTISTS if name != held_out]
        assert val.trained == [0, 1, 2] and test.trained == [-1]
        assert [len(one.labels) for one in val.domains] == [5] * 3, "other emoji"
        if seed == 4:
            assert test.support(0).unique().tolist() == [0]


def test_columns_and_folder_are_settings_and_sizes_may_differ(styles):
    folder = Path(styles["data"]["train"])
    (folder / "train").rename(folder / "images")
    Image.new("RGB", (30, 20)).save(folder / "images/a0.png")
    text = (folder / "metadata.csv").read_text()
    text = text.replace("filename,y,location_remapped", "file,label,hospital")
    (folder / "metadata.csv").write_text(text + "x.png,green,f,id_test\n")
    columns = {"image": "file", "label": "label", "domain": "hospital"}
    data = AdaptationData(**styles["data"], columns=columns, images="images")
    data.setup("fit")
    assert data.classes == ["blue", "red"], "rows of other splits are left out"
    first = data.sets["train"].domains[0].read([0])
    assert first.shape == (1, 3, 8, 8) and (first == -1).all(), "resized"


def test_bad_folders_are_errors(styles):
    folder = Path(styles["data"]["train"])
    table = folder / "metadata.csv"
    whole = table.read_text()

    def complaint(text: str) -> str:
        table.write_text(text)
        with pytest.raises(UserError) as error:
            AdaptationData(**styles["data"]).setup("fit")
        return str(error.value)

    assert "has no column 'y'; its columns are" in complaint(whole.replace(",y,", ",label,"))
    assert "no row has the split val" in complaint(whole.replace("d,val", "d,train"))
    assert "class green is in the test split, but has no training image" in complaint(
        whole.replace("e1.png,red", "e1.png,green")
    )
    assert "location_remapped f has one image in the test split" in complaint(
        whole.replace("e1.png,red,e", "e1.png,red,f")
    )
    lines = [line.replace(",b,", ",a,").replace(",c,", ",a,") for line in whole.splitlines()]
    assert "the train split has 1 location_remapped, expected two or more" in complaint("\n".join(lines))
    table.unlink()
    with pytest.raises(UserError, match="there is no data file"):
        AdaptationData(**styles["data"]).setup("fit")


def test_a_broken_image_is_named(styles, data):
    path = Path(styles["data"]["train"]) / "train/a0.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=r"a0.png cannot be read as an image"):
        data.sets["train"].domains[0].read([0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"side": 12}, "data.side is 12, expected a multiple of 8"),
        ({"support": 0}, "data.support and data.query are 0 and 24"),
        ({"held_out": "apple"}, "data.held_out is 'apple', expected one of openmoji, twemoji, noto, fluent"),
        ({"held_out": "noto", "train": "x"}, "data.held_out is noto, which only sprites have"),
        (
            {"columns": {"hospital": "x"}, "train": "x"},
            "data.columns names 'hospital', expected one of image",
        ),
        ({"columns": {"label": "x"}}, "data.columns is given, but data.train is sprites"),
    ],
)
def test_mistakes_are_errors(wrong, message):
    with pytest.raises(UserError, match=message):
        AdaptationData(**wrong)
