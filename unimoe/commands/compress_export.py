"""``unimoe compress export``: a packed model for other programs.

unimoe compress export runs/small runs/for_vllm --format compressed-tensors
unimoe compress export runs/small runs/small.gguf --format gguf
"""

import logging
from pathlib import Path
from typing import Literal

from unimoe.compress.export import check_exportable, export_compressed_tensors
from unimoe.files import atomic_folder, new_folder
from unimoe.model.loading import load_any

from .export_gguf import gguf

log = logging.getLogger(__name__)


def export(model: str, output: str, *, format: Literal["compressed-tensors", "gguf"]) -> None:
    """Write a model of `unimoe compress quantize` in the format of another program.

    Codes and scales stay as they are. What a format cannot hold is refused with the reason.

    Args:
        model: folder of the packed model.
        output: new folder (compressed-tensors), or a name that ends with .gguf.
        format: compressed-tensors for vLLM, of a stock mixture of experts with equal bits in each layer; gguf
            for llama.cpp, of what `unimoe export gguf` takes.
    """
    if format == "gguf":
        gguf(model, output)
        return
    new_folder(output)
    loaded, processor = load_any(model, device="cpu")
    check_exportable(loaded)
    with atomic_folder(output) as folder:
        export_compressed_tensors(loaded, folder)
        getattr(processor, "tokenizer", processor).save_pretrained(folder)
    size = (Path(output) / "model.safetensors").stat().st_size
    log.info("%s: %.1f MB", output, size / 1e6)
