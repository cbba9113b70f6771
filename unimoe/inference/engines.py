"""What a model's LLM runs on: torch, or another engine behind the same interface."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Union

from unimoe.compress.decoding import Decoding
from unimoe.errors import UserError
from unimoe.model.loading import load_any
from unimoe.model.modeling import UniMoeForConditionalGeneration
from unimoe.model.processing import UniMoeProcessor

from .gguf import GGUFType

if TYPE_CHECKING:
    from .llama import LlamaModel

Engine = Literal["torch", "llama.cpp"]
AnsweringModel = Union[UniMoeForConditionalGeneration, "LlamaModel"]
"""What answers: a model in torch, or one whose LLM runs in llama.cpp."""


def check_decoding(model: AnsweringModel, decoding: Decoding, prefix: str = "--") -> None:
    """
    Args:
        model: that is to answer.
        decoding: how.
        prefix: of a setting's name in messages.

    Raises:
        UserError: a setting is out of range, or has no meaning for this model or its engine.
    """
    from .llama import LlamaModel

    if isinstance(model, LlamaModel) and not decoding.plain:
        raise UserError(f"{prefix}{decoding.named}: llama.cpp routes by itself; use the engine torch")
    decoding.check(model, prefix)


def load_engine(
    model: str,
    engine: Engine = "torch",
    type: GGUFType | None = None,
    gguf: Path | None = None,
    rows: int = 1,
    device: str | None = None,
) -> tuple[AnsweringModel, UniMoeProcessor]:
    """A model on an engine, and its processor.

    Args:
        model: folder of a finished stage; in torch also of a multimodal model of transformers, or a hub id.
        engine: ``torch`` shows everything inside; ``llama.cpp`` answers faster and in less memory.
        type: of the weights in llama.cpp.
        gguf: file of `unimoe export gguf`.
        rows: answers that are decoded together at most.
        device: such as cpu or cuda (default: a GPU if available).

    Raises:
        UserError: the model cannot be loaded, the engine is missing or cannot express it, or settings of one
            engine are given to another.
    """
    if engine == "llama.cpp":
        from .llama import load_llama

        return load_llama(model, type, gguf, rows, device)
    for flag, value in {"--type": type, "--gguf": gguf}.items():
        if value is not None:
            raise UserError(f"{flag} {value}: the engine torch has no such setting; add --engine llama.cpp")
    return load_any(model, device=device)
