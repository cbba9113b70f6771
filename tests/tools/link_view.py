"""Make build/view/unimoe: links by which type checkers find the parts that pyproject.toml maps."""

import os
import shutil
import tomllib
from pathlib import Path

root = Path(__file__).resolve().parents[2]
view = root / "build" / "view" / "unimoe"
shutil.rmtree(view, ignore_errors=True)
view.mkdir(parents=True)
mapping = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
parts = [root / folder for name, folder in mapping.items() if name != "unimoe"]
for source in [*(root / "unimoe").iterdir(), *parts]:
    (view / source.name).symlink_to(os.path.relpath(source, view))
