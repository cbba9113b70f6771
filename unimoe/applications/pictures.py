"""Images in rows, for people to look at.

Shapes: B images, S side.
"""

from PIL import Image
from torch import Tensor


def sheet(images: Tensor, columns: int, scale: int = 2) -> Image.Image:
    """Images [B, 3, S, S] in -1..1 in rows of ``columns``, each pixel ``scale`` times as large."""
    side = images.shape[-1] * scale
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (side + 4), rows * (side + 4)), "white")
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    for place, image in enumerate(pixels):
        drawn = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
        page.paste(drawn, (place % columns * (side + 4) + 2, place // columns * (side + 4) + 2))
    return page
