"""Make build/view/unimoe: links by which type checkers find the parts that pyproject.toml maps.

Each file is a link in a real folder, since pyright does not look for sources in folders that are links.
"""

import os
import shutil
import tomllib
from pathlib import Path

root = Path(__file__).resolve().parents[2]
view = root / "build" / "view" / "unimoe"
shutil.rmtree(view, ignore_errors=True)
mapping = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
parts = [root / folder for name, folder in mapping.items() if name != "unimoe"]
for folder, place in [(root / "unimoe", view), *((part, view / part.name) for part in parts)]:
    for source in folder.rglob("*.py"):
        link = place / source.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(source, link.parent))
