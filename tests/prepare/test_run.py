"""Filling the cache with a tiny stand-in for a part: repeats, damage, wrong files, full disks, two runs."""

import hashlib
import json
import shutil
import tarfile
import threading
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import pytest

from unimoe.errors import UserError
from unimoe.prepare import cache_folder, copied, default_part, prepare, run
from unimoe.prepare.index import Link, Sources
from unimoe.prepare.parts import PARTS

FLUENT = PARTS["fluent"]


def test_part_is_made_once(wheels: Path, capsys):
    with pytest.raises(UserError, match=r"not in the cache .*; run `unimoe prepare`"):
        default_part("sprites")
    run.main(wheels=wheels)
    folder = default_part("sprites")
    assert folder == cache_folder() / "openmoji"
    assert (folder / "openmoji.ttf").read_bytes() == b"a font"
    assert (folder / "LICENSE").read_text() == "free"
    manifest = json.loads((folder / "part.json").read_text())
    assert manifest["licence"] == "CC-BY-SA-4.0" and manifest["files"] == {"LICENSE": 4, "openmoji.ttf": 6}
    assert "CC-BY-SA-4.0" in capsys.readouterr().out

    made = folder.stat().st_mtime_ns, folder.stat().st_ino
    shutil.rmtree(wheels)
    run.main()  # neither the package nor the network is needed again
    assert "nothing to do" in capsys.readouterr().out
    assert made == (folder.stat().st_mtime_ns, folder.stat().st_ino)


def test_a_package_of_npm_is_read(wheels: Path, tmp_path: Path, monkeypatch):
    file = wheels / FLUENT.filename
    with tarfile.open(file, "w:gz") as package:
        for name in ("package/assets/1f436.webp", "package/assets/1f436-200d.webp", "package/LICENSE"):
            (tmp_path / "content").write_text(name)
            package.add(tmp_path / "content", name)
    content = file.read_bytes()
    part = replace(FLUENT, sha256=hashlib.sha256(content).hexdigest(), size=len(content))
    monkeypatch.setitem(PARTS, "fluent", part)
    folder = prepare(["fluent"], wheels)["fluent"]
    assert sorted(one.name for one in folder.iterdir()) == ["1f436.webp", "LICENSE", "part.json"]
    assert (folder / "1f436.webp").read_text() == "package/assets/1f436.webp"
    file.write_bytes(content[:50])
    cut = hashlib.sha256(content[:50]).hexdigest()
    monkeypatch.setitem(PARTS, "fluent", replace(part, sha256=cut))
    with pytest.raises(UserError, match=r"0.tgz: not the expected package file"):
        prepare(["fluent"], wheels)


def test_downloaded_file_is_used_and_removed(wheels: Path, tmp_path: Path):
    downloads = tmp_path / "cache" / "downloads"
    shutil.copytree(wheels, downloads)
    prepare()
    assert default_part("sprites").is_dir() and not downloads.exists()


def test_a_file_of_two_parts_is_downloaded_and_counted_once(wheels: Path, monkeypatch):
    part = PARTS["sprites"]
    monkeypatch.setitem(PARTS, "again", replace(part, name="again", folder="again"))
    fetched = []

    def download(url, target, *rest):
        fetched.append(url)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(wheels / part.filename, target)

    monkeypatch.setattr(run, "find_sources", Sources)
    monkeypatch.setattr(run, "find_link", lambda part, sources: Link(part.filename, part.filename, None))
    monkeypatch.setattr(run, "download", download)
    usage = namedtuple("usage", "total used free")
    enough = run.MARGIN + 2 * part.room + part.size
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: usage(enough, 0, enough))
    prepare(["sprites", "again"])
    assert fetched == [part.filename]
    assert default_part("sprites").is_dir() and default_part("again").is_dir()
    assert not (cache_folder() / "downloads").exists()


def test_wrong_file(wheels: Path, tmp_path: Path):
    given = wheels / "font-1.0-any.whl"
    given.write_bytes(b"something else")
    with pytest.raises(
        UserError, match=r"wheels/font-1\.0-any\.whl: found SHA-256 .* expected .*; replace it"
    ):
        prepare(wheels=wheels)
    assert given.exists()  # the user's own file stays
    shutil.copytree(wheels, tmp_path / "cache" / "downloads")
    with pytest.raises(UserError, match=r"downloads/font-1\.0-any\.whl: found .*; it was removed"):
        prepare()
    assert sorted(file.name for file in cache_folder().iterdir()) == [".lock", "CACHEDIR.TAG", "downloads"]


def test_full_disk_is_seen_before_anything_is_fetched(wheels: Path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 2_000_000))
    with pytest.raises(
        UserError, match=r"not enough disk space in .* for sprites: found 2 MB free, expected 53 MB"
    ):
        prepare(wheels=wheels)
    assert not (cache_folder() / "openmoji").exists()


@pytest.mark.parametrize("in_safetensors", [False, True])
def test_full_disk_while_converting(wheels: Path, monkeypatch, in_safetensors: bool):
    import errno

    from safetensors import SafetensorError

    def full(wheel: ZipFile, folder: Path) -> None:
        (folder / "half").write_bytes(b"half")
        if in_safetensors:  # its way of saying so
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(copied, "openmoji", full)
    with pytest.raises(UserError, match="no space left on the disk"):
        prepare(wheels=wheels)
    assert sorted(file.name for file in cache_folder().iterdir()) == [".lock", "CACHEDIR.TAG"]


def test_cache_that_cannot_be_written(wheels: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("UNIMOE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="cannot write"):
        prepare(wheels=wheels)


@pytest.mark.timeout(30)
def test_two_at_once_make_it_once(wheels: Path, monkeypatch):
    count = 0
    convert = copied.openmoji

    def slow(wheel: ZipFile, folder: Path) -> None:
        nonlocal count
        count += 1
        time.sleep(0.1)
        convert(wheel, folder)

    monkeypatch.setattr(copied, "openmoji", slow)
    threads = [threading.Thread(target=prepare, kwargs={"wheels": wheels}, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert count == 1 and default_part("sprites").is_dir()


def test_leftovers_of_a_killed_run_are_removed(wheels: Path):
    left = cache_folder() / ".openmoji.abc123"
    left.mkdir(parents=True)
    prepare(wheels=wheels)
    assert not left.exists()


def test_unknown_names(wheels: Path, tmp_path: Path):
    with pytest.raises(UserError, match="no part is called 'sprite'; the parts are"):
        prepare(["sprite"])
    with pytest.raises(UserError, match="no such folder"):
        prepare(wheels=tmp_path / "nowhere")
