"""What a model's processor makes of data, without the model."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from unimoe.errors import UserError, first_line
from unimoe.model.build import prepare_tokenizer
from unimoe.model.configuration import MEDIA
from unimoe.model.processing import UniMoeProcessor
from unimoe.prepare.cache import resolve_part

from .sample import Part


def open_processor(model: str) -> UniMoeProcessor:
    """The processor of a finished stage's folder, or one around the tokenizer of an LLM.

    ``model`` may also be ``default`` or a hub id. An LLM of its own knows no media: each becomes one token.
    Raises UserError when there is none.
    """
    try:
        if (Path(model) / "processor_config.json").is_file():
            return UniMoeProcessor.from_pretrained(model, local_files_only=True)
        tokenizer: Any = AutoTokenizer.from_pretrained(str(resolve_part(model, "llm")))
    except (OSError, ValueError) as error:
        raise UserError(f"{model}: no model or tokenizer can be loaded: {first_line(error)}") from error
    prepare_tokenizer(tokenizer)
    processor = UniMoeProcessor(tokenizer)
    processor.preprocessors = dict.fromkeys(MEDIA, _Placeholder())  # type: ignore[assignment]
    return processor


class _Placeholder:
    """Stands in for a preprocessor: a medium is one token, and is not decoded."""

    outputs = ()

    def load(self, part: Part, where: str) -> Part:
        return part

    def __call__(self, part: Part) -> tuple[dict[str, Any], int]:
        return {}, 1
