import random

import pytest
from PIL import Image

from unimoe.errors import UserError
from unimoe.synthetic.sprites import FolderArtist, background, load_photos, open_artist, split_photos, vary


@pytest.mark.parametrize("name", ["1f436.png", "emoji_u1f436.png", "U+1F436.png", "1f436-fe0f.png"])
def test_a_sprite_is_cut_to_what_is_drawn(tmp_path, name):
    """A dog of 40 x 20 pixels on an empty canvas becomes 160 x 80; nearly transparent pixels do not count."""
    canvas = Image.new("RGBA", (100, 100), (0, 0, 0, 0))
    canvas.paste((200, 0, 0, 255), (30, 50, 70, 70))
    canvas.putpixel((0, 0), (0, 0, 0, 16))
    canvas.save(tmp_path / name)
    artist = open_artist(tmp_path)
    assert isinstance(artist, FolderArtist)
    dog = artist.sprite("🐶")
    assert dog.size == (160, 80) and dog.getpixel((80, 40)) == (200, 0, 0, 255)
    assert artist.sprite("🐱") is None
    canvas.save(tmp_path / "1f431.webp", lossless=True)
    cat = open_artist(tmp_path).sprite("🐱")
    assert cat is not None and cat.tobytes() == dog.tobytes()


def test_an_empty_drawing_is_none(tmp_path):
    Image.new("RGBA", (20, 20)).save(tmp_path / "1f436.png")
    assert open_artist(tmp_path).sprite("🐶") is None


def test_folders_and_files_without_drawings(tmp_path):
    with pytest.raises(UserError, match="no images named by code point"):
        open_artist(tmp_path)
    with pytest.raises(UserError, match="no such emoji font or folder"):
        open_artist(tmp_path / "nowhere.ttf")
    (tmp_path / "text.ttf").write_text("no font")
    with pytest.raises(UserError, match="text.ttf: not a colour font"):
        open_artist(tmp_path / "text.ttf")


def test_photos_are_made_small_and_tiny_ones_left_out(tmp_path):
    sizes = {"d.png": (1024, 600), "a.jpg": (96, 96), "b.png": (300, 95), "c.png": (100, 200)}
    for name, size in sizes.items():
        Image.new("RGB", size).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(UserError, match="found 3 usable photos, expected at least 4"):
        load_photos(tmp_path)
    Image.new("L", (200, 100)).save(tmp_path / "e.webp")
    photos = load_photos(tmp_path)
    assert {name: photo.size for name, photo in photos.items()} == {
        "a.jpg": (96, 96), "c.png": (100, 200), "d.png": (512, 300), "e.webp": (200, 100)
    }  # fmt: skip
    assert list(photos) == sorted(photos) and {photo.mode for photo in photos.values()} == {"RGB"}


def test_tests_stand_on_photos_that_training_never_shows():
    numbers = dict.fromkeys(f"{number}.png" for number in range(7))
    train, test = split_photos(numbers)
    assert list(test) == ["0.png", "5.png"] and list(train) == ["1.png", "2.png", "3.png", "4.png", "6.png"]
    train, test = split_photos({**numbers, "grass.jpg": None})
    assert list(test) == ["grass.jpg"] and len(train) == 7


@pytest.mark.parametrize("restyle", [False, True])
def test_views_follow_from_the_seed(restyle):
    noise = Image.effect_noise((120, 100), 60)
    photo, sprite = noise.convert("RGB"), noise.convert("RGBA")
    views = [background(photo, random.Random(seed), 48, restyle) for seed in (1, 1, 2)]
    assert {view.size for view in views} == {(48, 48)}
    assert views[0].tobytes() == views[1].tobytes() != views[2].tobytes()
    sprites = [vary(sprite, random.Random(seed), 60, restyle) for seed in (1, 1, 2)]
    assert sprites[0].tobytes() == sprites[1].tobytes() != sprites[2].tobytes()
    assert all(60 <= max(view.size) <= 80 for view in sprites)  # turned by up to 25 degrees
