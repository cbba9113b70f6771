"""Draws boxes on images."""

import colorsys
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


def colour(label: int) -> tuple[int, int, int]:
    """The color of a label: always the same, and unlike those of its neighbours in the list."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618 % 1.0, 0.8, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_boxes(
    image: Image.Image, boxes: Sequence[Sequence[float]], labels: Sequence[int], texts: Sequence[str]
) -> Image.Image:
    """A copy of the image with (x1, y1, x2, y2) boxes in the colours of their labels, the best on top."""
    image = image.convert("RGB")
    pen = ImageDraw.Draw(image)
    size = max(10, max(image.size) // 40)
    font, width = ImageFont.load_default(size), max(2, size // 6)
    for box, label, text in reversed(list(zip(boxes, labels, texts, strict=True))):
        x1, y1, x2, y2 = box
        pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour(label), width=width)
        if not text:
            continue
        left, top, right, bottom = pen.textbbox((x1, y1), text, font=font)
        up = bottom - top + 4 if y1 > bottom - top + 4 else 0  # above the box where there is room
        pen.rectangle((left, top - up, right + 3, bottom - up + 2), fill=colour(label))
        pen.text((x1 + 1, y1 - up), text, fill="white", font=font)
    return image
