"""Finding a part in the cache, and what is wrong with one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from unimoe.errors import UserError
from unimoe.prepare import cache_folder, default_part, prepare, resolve_part
from unimoe.prepare.parts import PARTS


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "openmoji.ttf").write_bytes(b"a f"),
            r"openmoji\.ttf has 3 bytes, expected 6",
        ),
        (lambda folder: (folder / "openmoji.ttf").unlink(), r"openmoji\.ttf is missing"),
        (lambda folder: (folder / "part.json").write_text("{"), r"part\.json cannot be read"),
        (lambda folder: (folder / "part.json").unlink(), "not in the cache"),
    ],
)
def test_damage_is_seen_and_mended(wheels: Path, damage, message: str):
    prepare(wheels=wheels)
    damage(cache_folder() / "openmoji")
    with pytest.raises(UserError, match=message):
        default_part("sprites")
    prepare(wheels=wheels)
    assert (default_part("sprites") / "openmoji.ttf").read_bytes() == b"a font"


def test_new_converter_makes_the_part_again(wheels: Path, monkeypatch):
    prepare(wheels=wheels)
    monkeypatch.setitem(PARTS, "sprites", replace(PARTS["sprites"], converter_version=99))
    with pytest.raises(UserError, match="another version"):
        default_part("sprites")
    prepare(wheels=wheels)
    assert json.loads((default_part("sprites") / "part.json").read_text())["converter_version"] == 99


def test_each_part_can_be_replaced(wheels: Path, tmp_path: Path, monkeypatch):
    prepare(wheels=wheels)
    assert resolve_part("default", "sprites") == cache_folder() / "openmoji"
    assert resolve_part(str(tmp_path), "llm") == tmp_path
    assert resolve_part("owner/name", "llm") == "owner/name"
    assert resolve_part("gpt2", "llm") == "gpt2"
    monkeypatch.chdir(tmp_path)
    assert resolve_part("wheels", "llm") == Path("wheels")
    for wrong in ("./missing", "/missing/folder", "~/missing-folder-of-unimoe", "runs/a/b", ""):
        with pytest.raises(UserError, match="does not exist; expected default, a local folder or a hub id"):
            resolve_part(wrong, "llm")
