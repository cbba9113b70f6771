"""``unimoe export gguf``: a model's LLM as one file that llama.cpp runs."""

import logging
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from unimoe.errors import UserError
from unimoe.inference.gguf import GGUFType, source_hash, write_gguf
from unimoe.model.loading import load_model

log = logging.getLogger(__name__)


def gguf(model: str, path: str, /, *, type: GGUFType = "q8_0") -> None:
    """Write the LLM of a model, with its experts, as a GGUF file.

    Any llama.cpp answers text with it. Images, video, speech and audio need our encoders in front:
    `unimoe serve MODEL --engine llama.cpp --gguf FILE`.

    Args:
        model: folder of a finished stage.
        path: where to write, a name that ends with .gguf.
        type: numbers of the weights: q8_0, 8 bits in blocks of 32; f16; f32, exact.
    """
    if not path.endswith(".gguf"):
        raise UserError(f"{path}: expected a name that ends with .gguf")
    disable_progress_bar()  # transformers' own
    loaded, processor = load_model(model, device="cpu", hub=False)
    write_gguf(loaded, processor.tokenizer, path, type, source_hash(model))
    log.info("wrote %s, %.1f MB", path, Path(path).stat().st_size / 1e6)
