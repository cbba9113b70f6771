"""What is installed: a wheel built from the checkout, and imports beside a distribution named ``kernels``."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = SETTINGS["tool"]["setuptools"]["package-dir"]  # "unimoe.kernels": "kernels", ...
JUNK = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info")


def run(code: str, cwd: Path, path: Path | None = None) -> str:
    """Run ``code`` by ``python -c``: ``cwd`` is first on the new process's path, ``path`` behind it."""
    environment = {
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
        **({"PYTHONPATH": str(path)} if path else {}),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The unpacked wheel, built from a copy of the checkout so that nothing is left in it."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "checkout"
    copy.mkdir()
    for name in FOLDERS.values():
        shutil.copytree(ROOT / name, copy / name, ignore=JUNK)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    command = [sys.executable, "-c", build, str(folder)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    unpacked = folder / "unpacked"
    zipfile.ZipFile(folder / done.stdout.split()[-1]).extractall(unpacked)
    return unpacked


def files(folder: Path) -> set[str]:
    return {
        str(file.relative_to(folder))
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def test_the_wheel_holds_every_file(wheel):
    expected = set()
    for package, folder in FOLDERS.items():
        place = package.replace(".", "/")
        for name in files(ROOT / folder):
            if not any(part.startswith(".") for part in Path(name).parts):
                expected.add(f"{place}/{name}")
    found = {name for name in files(wheel) if not name.split("/")[0].endswith(".dist-info")}
    assert found == expected, "complete `packages` and `package-data` in pyproject.toml"
    assert "unimoe/py.typed" in found


def test_the_wheel_brings_licence_and_command(wheel):
    (info,) = wheel.glob("unimoe-*.dist-info")
    assert (info / "licenses/LICENSE").read_text().strip().startswith("Apache License")
    assert "unimoe = unimoe.commands.main:main" in (info / "entry_points.txt").read_text()


def test_the_wheel_is_imported_without_the_checkout(wheel, tmp_path):
    code = """
import importlib, importlib.resources, pkgutil, unimoe
print(unimoe.__file__)
for folder in ("encoders", "stages", "moe", "data", "kernels"):
    package = importlib.import_module("unimoe." + folder)
    for module in pkgutil.iter_modules(package.__path__):
        if "triton" not in module.name:
            importlib.import_module(f"unimoe.{folder}.{module.name}")
    print(*package.__path__)
print(importlib.resources.files("unimoe.configs"))
"""
    lines = run(code, cwd=tmp_path, path=wheel).splitlines()
    assert len(lines) == 7 and all(str(wheel) in line for line in lines), lines


def test_kernels_is_a_namespace():
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels/__init__.py").exists(), "as a regular package it breaks transformers' import"


FAKE = """
class _Anything:
    def __init__(self, *args, **kwargs): ...
    def __call__(self, decorated=None, **kwargs):
        return decorated
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything
__version__ = "{version}"
"""


@pytest.mark.parametrize("version", [None, "0.18.2"])
def test_transformers_imports_from_the_root(tmp_path, version):
    """Our ``kernels/`` lies first on the path here; a distribution of that name further down must win."""
    if version:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels/__init__.py").write_text(FAKE.format(version=version))
        info = tmp_path / f"kernels-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    code = """
import sys
from transformers import AutoModelForCausalLM
import transformers.modeling_utils
from transformers.utils import is_kernels_available
import unimoe.kernels
print(is_kernels_available(), hasattr(sys.modules.get("kernels"), "__version__"), *unimoe.kernels.__path__)
"""
    available, real, *path = run(code, cwd=ROOT, path=tmp_path).splitlines()[-1].split()
    assert available == str(bool(version))
    assert real == str(bool(version))
    assert {Path(place).resolve() for place in path} == {ROOT / "kernels"}


def test_the_root_folders_are_parts_of_unimoe_from_anywhere(tmp_path):
    names = [name for name in FOLDERS if name != "unimoe"]
    code = f"import importlib\nfor name in {names}: print(*importlib.import_module(name).__path__)"
    lines = run(code, cwd=tmp_path).splitlines()
    assert [Path(line.split()[0]).resolve() for line in lines] == [ROOT / FOLDERS[name] for name in names]
