"""Reading the checkpoint files of several makers, and filling a module from them."""

import json
import logging
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from unimoe.errors import UserError, first_line

logger = logging.getLogger(__name__)

# In a folder the first of these that exists is read; then a single file with one of the suffixes.
_FILE_NAMES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def find_weights(path: str | Path) -> Path:
    """The weights file that ``path`` names: itself, or the one inside it when it is a folder.

    Raises:
        UserError: there is none, or a folder holds several and none has a usual name.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; expected encoder weights there")
    for name in _FILE_NAMES:
        if (path / name).is_file():
            return path / name
    found = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise UserError(f"{path}: expected one weights file ({' '.join(_SUFFIXES)}), found {names}")
    return found[0]


def hub_file(name: str, *files: str) -> str:
    """The path of the first of ``files`` in the model ``name`` on the Hugging Face hub, downloaded unless
    cached.

    Raises:
        UserError: the name is no local folder, and the hub has no such file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        for file in files:
            try:
                return hf_hub_download(name, file)
            except EntryNotFoundError:
                continue
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(
            f"{name}: no file or folder here, and not available from the hub ({reason})"
        ) from error
    raise UserError(f"{name}: the hub's model has none of {', '.join(files)}")


def read_file(file: Path) -> Any:
    """What a weights file holds, on the CPU.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        reason = first_line(error)
        raise UserError(f"{file}: cannot be read as weights ({reason})") from error


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors of a file, a sharded file's index, or the folder around either, on the CPU.

    Safetensors and ``torch.save`` files (read with ``weights_only=True``); the usual wrappings
    (``state_dict``, ``model_state_dict``, ``model``; names under ``module.``) are taken off.

    Raises:
        UserError: the file is missing or cannot be read.
    """
    file = find_weights(path)
    if file.name.endswith(".index.json"):
        shards = sorted(set(json.loads(file.read_text())["weight_map"].values()))
        return {name: t for shard in shards for name, t in read_tensors(file.parent / shard).items()}
    content = read_file(file)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{file}: holds {type(content).__name__} without tensors, expected a state dict")
    return {
        name.removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)
    }


def select_prefix(
    tensors: dict[str, Tensor], module: nn.Module, prefixes: Sequence[str]
) -> dict[str, Tensor]:
    """The tensors under that prefix which covers most of ``module``'s names, with the prefix taken off.

    So a tower is found in a file of its own as well as inside a whole model's file.
    """
    expected = module.state_dict().keys()
    best = max(prefixes, key=lambda prefix: sum(prefix + name in tensors for name in expected))
    return {name[len(best) :]: tensor for name, tensor in tensors.items() if name.startswith(best)}


def fill(module: nn.Module, tensors: dict[str, Tensor], source: str | Path) -> None:
    """Copy ``tensors`` into ``module``, all of whose persistent tensors must be there in the same shape.

    Tensors that the module does not have (a head that was removed, a text tower) are left aside. Raises
    UserError naming ``source`` and the first tensor that is missing or of another shape.
    """
    expected = module.state_dict()
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise UserError(
            f"{source}: {len(missing)} of {len(expected)} tensors are missing, first {missing[0]!r}; "
            f"the file starts with {next(iter(tensors), 'nothing')!r}"
        )
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape:
            found, wanted = list(tensors[name].shape), list(tensor.shape)
            raise UserError(f"{source}: tensor {name!r} has shape {found}, expected {wanted}")
    module.load_state_dict({name: tensors[name] for name in expected})
    logger.info("%s: read %d tensors, left %d aside", source, len(expected), len(tensors) - len(expected))


def own_weights(module: nn.Module) -> None:
    """Move parameters and buffers that lie in a mapped file into memory of the process, in place.

    safetensors maps files: when a file is replaced, the weights change, or the process ends by SIGBUS. Such
    weights also begin wherever the file has them, while matrix libraries choose their kernels, and with them
    the rounding, by alignment. Memory of torch's allocator is aligned to 64 bytes.
    """
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
