"""Boxes on a copy of an image."""

from PIL import Image

from unimoe.detection.inference.drawing import draw_boxes


def test_boxes_are_drawn_on_a_copy():
    picture = Image.new("RGB", (60, 60), "white")
    drawn = draw_boxes(picture, [[10, 30, 50, 55], [0, 0, 5, 5]], [0, 1], ["cat 0.90", ""])
    assert picture.getcolors() == [(3600, (255, 255, 255))]
    assert drawn.getpixel((10, 45)) != (255, 255, 255) and drawn.getpixel((30, 45)) == (255, 255, 255)
