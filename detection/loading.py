"""A finished detector: a folder of ``unimoe fit``, or public Grounding DINO weights, here or on the hub."""

from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer

from unimoe.errors import UserError
from unimoe.loading import HUB_ID

from .build import Built
from .configuration import DynamicDinoConfig
from .grounding_dino import MODEL_TYPES, load_grounding_dino
from .modeling import DynamicDinoForObjectDetection


def load_detector(model: str | Path, setting: str = "MODEL") -> Built:
    """The detector, in evaluation mode on the CPU, and its tokenizer.

    ``setting`` is what errors call it. Raises UserError when there is no detector, or when its weights and
    its configuration do not have the same names and shapes.
    """
    path = Path(model).expanduser()
    if path.exists() and not (path / "config.json").is_file():
        raise UserError(f"{setting} {path}: expected a folder with config.json and weights, see `unimoe fit`")
    local = path.parent != Path(".") and path.parent.is_dir()  # runs/demo/mow, where runs/demo is there
    if not path.exists() and (local or not HUB_ID.fullmatch(str(model))):
        raise UserError(f"{setting} {path} does not exist; expected a model folder or a hub id (owner/name)")
    source = str(path if path.exists() else model)
    try:
        config = AutoConfig.from_pretrained(source)
        if config.model_type in MODEL_TYPES:
            return load_grounding_dino(source)
        if not isinstance(config, DynamicDinoConfig):
            raise UserError(f"{setting} {model} is a {config.model_type} model, expected a detector of ours")
        loaded, info = DynamicDinoForObjectDetection.from_pretrained(source, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{setting} {model} cannot be loaded: {reason}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info[problem])):
            found = f"{len(names)} {problem.replace('_', ' ')}, such as {names[0]}"
            raise UserError(f"{setting} {model}: config.json and weights differ: {found}")
    return loaded.eval(), tokenizer
