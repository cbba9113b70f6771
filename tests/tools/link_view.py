"""Make build/view/unimoe: links by which type checkers find the parts that pyproject.toml maps.

Each file is a link in a real folder, since pyright does not look for sources in folders that are links.
"""

import os
import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def link_view(view: Path) -> None:
    """Make ``view`` the package ``unimoe`` with all its parts, in place of what is there."""
    shutil.rmtree(view, ignore_errors=True)
    mapping = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    parts = [ROOT / folder for name, folder in mapping.items() if name != "unimoe"]
    for folder, place in [(ROOT / "unimoe", view), *((part, view / part.name) for part in parts)]:
        for source in folder.rglob("*.py"):
            link = place / source.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(source, link.parent.resolve()))


if __name__ == "__main__":
    link_view(ROOT / "build" / "view" / "unimoe")
