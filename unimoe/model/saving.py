"""Can a model be saved, and loaded again? Asked before a run's first step, not after its last."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import GenerationConfig

from unimoe.errors import UserError, first_line

from .configuration import UniMoeConfig
from .loading import build_on_meta
from .modeling import UniMoeForConditionalGeneration
from .processing import UniMoeProcessor


def check_saveable(model: UniMoeForConditionalGeneration, processor: UniMoeProcessor) -> None:
    """Save and load everything but the weights, and see that the weights have a place in what is loaded.

    Raises:
        UserError: transformers refuses to save a part or to load it again, or the model that the saved
            configuration describes has other weights than this one.
    """
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            model.config.save_pretrained(folder)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(folder)
                GenerationConfig.from_pretrained(folder)
            processor.save_pretrained(folder)
            UniMoeProcessor.from_pretrained(folder, local_files_only=True)
            config: Any = UniMoeConfig.from_pretrained(folder)
            loaded = build_on_meta(config)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise UserError(f"the finished model could not be saved: {first_line(error)}") from error
    own, found = (
        {name: list(tensor.shape) for name, tensor in one.state_dict().items()} for one in (model, loaded)
    )
    for name in sorted(own.keys() | found.keys()):
        if own.get(name) != found.get(name):
            raise UserError(
                f"the finished model could not be loaded: its weight {name} has shape {own.get(name)}, what "
                f"its configuration describes has {found.get(name)}"
            )
