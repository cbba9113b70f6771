import hashlib
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import pytest

from unimoe.errors import UserError
from unimoe.prepare import copied, run
from unimoe.prepare.index import Sources
from unimoe.prepare.parts import PARTS


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch) -> Path:
    """A folder with a tiny font package, which is the only part; an empty cache; no way to the network."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    file = folder / "font-1.0-any.whl"
    with ZipFile(file, "w") as wheel:
        wheel.writestr(copied.OPENMOJI, b"a font")
        wheel.writestr("font-1.0.dist-info/LICENSE", "free")
    content = file.read_bytes()
    part = replace(
        PARTS["sprites"],
        filename=file.name,
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
    )
    for name in [name for name in PARTS if name != "sprites"]:
        monkeypatch.delitem(PARTS, name)
    monkeypatch.setitem(PARTS, "sprites", part)
    monkeypatch.setenv("UNIMOE_CACHE", str(tmp_path / "cache"))

    def no_network() -> Sources:
        raise UserError("no network in this test")

    monkeypatch.setattr(run, "find_sources", no_network)
    return folder
