"""Expert folders: the FFNs trained by one dense stage, for a slot of a mixture.

expert.json              task, fingerprint of the base LLM, shapes, the stage that wrote it
expert.safetensors       layers.{i}.gate_up_proj [2I, H] (gate rows first), layers.{i}.down_proj [H, I]
connectors.safetensors   {modality}.{name}: the connectors after that stage
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unimoe.errors import UserError
from unimoe.files import file_hash, fingerprint
from unimoe.model.modeling import UniMoeForConditionalGeneration
from unimoe.moe import read_swiglu

FORMAT = 1


@dataclass
class ExpertInfo:
    """The content of ``expert.json``."""

    task: str
    """What the expert is for, from the configuration."""

    stage: str
    """Name of the stage that wrote it."""

    base_llm: str
    """Fingerprint of the LLM it was trained from, see :func:`base_fingerprint`."""

    num_layers: int
    """Decoder layers."""

    hidden_size: int
    """H."""

    intermediate_size: int
    """I."""

    sha256: str = ""
    """Hash of ``expert.safetensors``."""

    format: int = FORMAT
    """Version of this layout."""

    connectors: list[str] = field(default_factory=list)
    """Modalities whose connector is in the folder."""


@dataclass
class Expert:
    """An expert folder in memory."""

    info: ExpertInfo
    """Description of the expert."""

    tensors: dict[str, Tensor]
    """``layers.{i}.gate_up_proj`` [2I, H] and ``layers.{i}.down_proj`` [H, I]."""

    def decoder(self, act_fn: nn.Module | None = None) -> Any:
        """The FFNs where a decoder has them (``layers[i].mlp``), to make experts of; ``act_fn`` is the
        activation of the gate, None for SiLU."""
        layers = []
        for index in range(self.info.num_layers):
            mlp: Any = nn.Module()
            mlp.act_fn = act_fn
            for name in ("gate_up_proj", "down_proj"):
                linear = nn.Linear(1, 1, bias=False, device="meta")
                linear.weight = nn.Parameter(self.tensors[f"layers.{index}.{name}"])
                setattr(mlp, name, linear)
            layers.append(SimpleNamespace(mlp=mlp))
        return SimpleNamespace(layers=layers)


def base_fingerprint(model: UniMoeForConditionalGeneration) -> str:
    """Hash of the LLM's weights that experts depend on: all but FFNs and embeddings, as float32.

    All experts of one base share it: neither trained FFNs nor added placeholder tokens change it.
    """
    weights = sorted(model.model.language_model.state_dict().items())
    kept = [(name, tensor) for name, tensor in weights if ".mlp." not in name and "embed" not in name]
    return fingerprint(*(item for name, tensor in kept for item in (name, tensor.float())))


def ffn_tensors(model: UniMoeForConditionalGeneration) -> dict[str, Tensor]:
    """The FFN weights of every decoder layer of a dense model, under the names of an expert folder."""
    decoder: Any = model.model.language_model
    tensors = {}
    for index, layer in enumerate(decoder.layers):
        gate_up, down = read_swiglu(layer.mlp)
        tensors[f"layers.{index}.gate_up_proj"] = gate_up
        tensors[f"layers.{index}.down_proj"] = down
    return tensors


def save_expert(
    folder: Path, model: UniMoeForConditionalGeneration, base_llm: str, stage: str, task: str
) -> None:
    """Write the FFNs and connectors of a dense model, its adapters merged, into an existing folder."""
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in ffn_tensors(model).items()}
    save_file(tensors, folder / "expert.safetensors")
    connectors = {
        name: t.detach().cpu().contiguous().clone() for name, t in model.model.connectors.state_dict().items()
    }
    if connectors:
        save_file(connectors, folder / "connectors.safetensors")
    down = tensors["layers.0.down_proj"]
    info = ExpertInfo(
        task=task,
        stage=stage,
        base_llm=base_llm,
        num_layers=len(tensors) // 2,
        hidden_size=down.shape[0],
        intermediate_size=down.shape[1],
        sha256=file_hash(folder / "expert.safetensors"),
        connectors=sorted(model.model.connectors),
    )
    (folder / "expert.json").write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")


def load_expert(folder: str | Path) -> Expert:
    """Read an expert folder. Raises UserError if it is none, of another version, incomplete or modified."""
    path = Path(folder)
    try:
        fields = json.loads((path / "expert.json").read_text(encoding="utf-8"))
        info = ExpertInfo(**fields)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is not an expert folder: it has no expert.json") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path / 'expert.json'} cannot be read ({error})") from error
    if info.format != FORMAT:
        raise UserError(f"{path / 'expert.json'}: format {info.format}, expected {FORMAT}")
    file = path / "expert.safetensors"
    if not file.is_file() or file_hash(file) != info.sha256:
        raise UserError(f"{file} is missing or not what expert.json describes ({info.sha256[:12]}...)")
    return Expert(info, _read(file))


def load_connectors(folder: str | Path, modality: str) -> dict[str, Tensor]:
    """State dict of one connector of an expert or model folder. Raises UserError if it is missing."""
    path = Path(folder)
    files = {"connectors.safetensors": "", "model.safetensors": "model.connectors."}
    for name, prefix in files.items():
        if (path / name).is_file():
            start = f"{prefix}{modality}."
            found = {
                key.removeprefix(start): t for key, t in _read(path / name).items() if key.startswith(start)
            }
            if not found:
                raise UserError(f"{path / name} holds no {modality} connector")
            return found
    if (path / "model.safetensors.index.json").is_file():
        index = json.loads((path / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
        start = f"model.connectors.{modality}."
        shards = {shard for key, shard in index.items() if key.startswith(start)}
        found = {
            key: t for shard in shards for key, t in _read(path / shard).items() if key.startswith(start)
        }
        if found:
            return {key.removeprefix(start): tensor for key, tensor in found.items()}
    raise UserError(
        f"connectors.{modality}: {path} is neither an expert folder nor a model folder with a {modality} "
        "connector"
    )


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read as safetensors ({error})") from error
