from PIL import Image

from unimoe.applications.labelled_images import CLASSES, draw_sprites


class Painter:
    """Draws every emoji but clocks as a square whose grey tells the code point."""

    def sprite(self, char: str) -> Image.Image | None:
        number = ord(char)
        if 0x1F550 <= number <= 0x1F567:
            return None
        return Image.new("RGBA", (20, 10), (number % 256,) * 3 + (255,))


def test_drawings_of_one_code_point_share_a_split():
    sets = draw_sprites([Painter(), Painter()], side=8)
    numbers = {split: set() for split in sets}
    for split, found in sets.items():
        assert found.images.shape[1:] == (3, 8, 8) and found.images.min() >= -1 and found.images.max() <= 1
        assert list(CLASSES).index("clock") not in found.labels
        for image, label in zip(found.images, found.labels, strict=True):
            numbers[split].add((int(label), round(float((image[0, 4, 4] + 1) * 127.5))))
        assert found.images[:, :, 0].min() == 1, "above and below is white"
    every = [point for found in numbers.values() for point in found]
    assert len(sets["train"]) > 4 * len(sets["val"]) > 0 and len(every) > 300
    names = sets["train"].names
    assert "grinning face" in names and len(names) == len(sets["train"])
