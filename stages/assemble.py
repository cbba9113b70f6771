"""``unimoe assemble``: build a mixture of experts from a base model and expert folders by a manifest.

    base: runs/align                  # a dense model folder; everything but the experts comes from it
    experts:                          # one slot each, in order; or a number of copies of the base's FFNs
      - {name: words, from: base, data: text.jsonl}
      - {name: image, from: runs/expert_image, data: [names.jsonl, questions.jsonl]}
    connectors: {image: runs/expert_image}   # default: the base's own
    moe:                              # unimoe.moe.MoEConfig without experts.copies, or a preset
      router: {kind: top_k, k: 2}
      experts: {slices: 2}            # split each slot's FFNs into two experts
      placement: interval
    routers: {scale: 6}               # initialisation where slots name data, see router_start.py
    seed: 0                           # of fresh routers, and of the choice of their samples
    output: runs/assembled

Relative paths start from the working directory, as in the configurations of stages.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from unimoe.artifacts import StageRecord, check_same, clear, flatten, folder_hash, read_record, write_result
from unimoe.data.read import data_files, data_hashes
from unimoe.errors import UserError
from unimoe.model.loading import find_model, load_model
from unimoe.model.modeling import UniMoeForConditionalGeneration
from unimoe.model.processing import UniMoeProcessor
from unimoe.moe import MoEConfig, SwiGLUExperts, cut_swiglu, install_moe
from unimoe.moe.install import moe_layers
from unimoe.moe.settings import merge, parse_settings

from .experts_file import base_fingerprint, ffn_tensors, load_connectors, load_expert
from .router_start import RouterStart, start_routers

log = logging.getLogger(__name__)

BASE = "base"
"""The source of a slot or connector that stays the base model's own."""


@dataclass
class Slot:
    """One expert of every MoE layer."""

    name: str
    """Name in reports."""

    source: str = BASE
    """``base``, or an expert folder (``from`` in the manifest)."""

    data: list[str] = field(default_factory=list)
    """Files of samples for this expert, to initialise the routers."""


@dataclass
class Manifest:
    """The content of a manifest; see the top of this file."""

    base: str
    """Folder of a dense model."""

    experts: list[Slot]
    """The slots, in order."""

    connectors: dict[str, str] = field(default_factory=dict)
    """Modality -> expert or model folder of its connector."""

    moe: dict[str, Any] = field(default_factory=dict)
    """Fields of MoEConfig."""

    routers: RouterStart = field(default_factory=RouterStart)
    """Initialisation of the routers where slots name data; otherwise it is random."""

    seed: int = 0
    """Of fresh routers, and of the choice of their samples."""

    output: str | None = None
    """Folder of the result."""


def assemble(
    manifest: str, output: str | None = None, overwrite: bool = False, moe: Sequence[str] = ()
) -> None:
    """Build a mixture of experts from a base model and expert folders.

    Args:
        manifest: YAML file that names the base, the expert of each slot, the connectors and the routing.
        output: folder of the result; default that of the manifest.
        overwrite: delete what an earlier run left in the output.
        moe: settings of the mixture that replace the manifest's, such as placement=all.

    Raises:
        UserError: the manifest is wrong, or a part does not fit the base.
    """
    parsed = read_manifest(manifest)
    parsed.moe = merge(parsed.moe, parse_settings(moe, copies=False))
    if parsed.experts[0].data and mixture(parsed).experts["slices"] != 1:
        raise UserError(
            f"{manifest}: routers that start from data need moe.experts.slices 1; leave out the data"
        )
    target = output or parsed.output
    if target is None:
        raise UserError(f"{manifest}: an output folder is missing: output: FOLDER, or --output")
    folder = Path(target)
    find_model(parsed.base, "base", hub=False)
    parents = [{"folder": path, "sha256": folder_hash(path)} for path in _sources(parsed)]
    files = _data(parsed)
    content = {"content of parents": parents, "content of data": data_hashes(files)}
    settings = {**flatten({**asdict(parsed), "output": None}), **content}
    if overwrite:
        clear(folder)
    done = read_record(folder)
    if done is not None:
        check_same(folder, done.settings, settings)
        log.info("%s is finished: assembled with this manifest before", folder)
        return

    model, processor = put_together(parsed)
    if files:
        slots = [slot.data for slot in parsed.experts]
        start_routers(model, processor, slots, parsed.routers, folder.parent / "features", parsed.seed)
    sparse = moe_layers(model)
    record = StageRecord(
        stage="assemble",
        settings=settings,
        parents=parents,
        parameters={
            "total": sum(p.numel() for p in model.parameters()),
            "experts": sum(p.numel() for layer in sparse.values() for p in layer.experts.parameters()),
        },
    )

    def save(temporary: Path):
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        text = yaml.safe_dump({**asdict(parsed), "output": str(folder), "sha256": parents}, sort_keys=False)
        (temporary / "manifest.yaml").write_text(text, encoding="utf-8")

    write_result(folder, save, record)
    names = ", ".join(slot.name for slot in parsed.experts)
    log.info("%s: %d MoE layers of %d experts (%s)", folder, len(sparse), len(parsed.experts), names)


def put_together(manifest: Manifest) -> tuple[UniMoeForConditionalGeneration, UniMoeProcessor]:
    """Build the model of a manifest in memory. Raises UserError if a part does not fit the base."""
    model, processor = load_model(manifest.base, "base", torch.float32, "cpu", hub=False)
    if model.config.moe:
        raise UserError(f"base: {manifest.base} is a mixture of experts already; expected a dense model")
    dense = ffn_tensors(model)
    fingerprint = base_fingerprint(model)
    moe = mixture(manifest)
    with torch.random.fork_rng():
        torch.manual_seed(manifest.seed)
        install_moe(model.model.language_model, moe)  # copies in every slot, fresh routers
    model.config.moe = moe.to_dict()
    for slot, entry in enumerate(manifest.experts):
        if entry.source != BASE:
            _fill_slot(model, slot, entry.source, dense, fingerprint)
    for kind, source in manifest.connectors.items():
        if source != BASE:
            _replace_connector(model, kind, source)
    return model, processor


def mixture(manifest: Manifest) -> MoEConfig:
    """The MoE layers of a manifest, one copy of each FFN per slot."""
    return MoEConfig.for_upcycling(merge(manifest.moe, {"experts": {"copies": len(manifest.experts)}}))


def read_manifest(path: str | Path) -> Manifest:
    """Read and check a manifest file. Raises UserError naming the key that is wrong."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as a manifest: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: expected the keys {', '.join(_names(Manifest))}, found {type(content).__name__}"
        )
    _check_keys(f"{path}:", content, _names(Manifest))
    if not isinstance(content.get("base"), str):
        raise UserError(f"{path}: base must name the folder of a dense model, found {content.get('base')!r}")
    if isinstance(moe := content.get("moe"), dict) and (
        "num_experts" in moe or "copies" in (moe.get("experts") or {})
    ):
        raise UserError(f"{path}: the number of experts follows from experts; leave it out of moe")
    for key, kind in (("connectors", dict), ("moe", dict), ("routers", dict), ("seed", int)):
        if not isinstance(content.get(key, kind()), kind):
            raise UserError(f"{path}: {key} must be of type {kind.__name__}, found {content[key]!r}")
    routers = content.get("routers", {})
    _check_keys(f"{path}: routers:", routers, _names(RouterStart))
    slots = _slots(path, content.get("experts"))
    return Manifest(**{**content, "experts": slots, "routers": RouterStart(**routers)})


def _slots(path: str | Path, experts: Any) -> list[Slot]:
    if isinstance(experts, int) and experts > 0:
        return [Slot(f"copy{index}") for index in range(experts)]
    if not isinstance(experts, list) or not experts:
        raise UserError(f"{path}: experts must be a list of slots or a number of copies, found {experts!r}")
    slots = []
    for index, entry in enumerate(experts):
        where = f"{path}: experts[{index}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("from"), str):
            raise UserError(f"{where} must be {{name: NAME, from: FOLDER or base}}, found {entry!r}")
        _check_keys(where, entry, ["name", "from", "data"])
        data = entry.get("data", [])
        files = [data] if isinstance(data, str) else data
        if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
            raise UserError(f"{where}: data must be a file or a list of files, found {data!r}")
        slots.append(Slot(str(entry.get("name", f"{index}")), entry["from"], files))
    without = [slot.name for slot in slots if not slot.data]
    if without and len(without) < len(slots):
        raise UserError(
            f"{path}: slot {without[0]} names no data; the routers need that of every slot, or of none"
        )
    return slots


def _fill_slot(
    model: UniMoeForConditionalGeneration, slot: int, source: str, dense: dict[str, Tensor], fingerprint: str
):
    """Copy an expert folder into one slot of every MoE layer; ``dense`` holds the base's FFNs."""
    expert = load_expert(source)
    for name, own in dense.items():
        found = list(expert.tensors[name].shape) if name in expert.tensors else "nothing"
        if found != list(own.shape):
            wanted = list(own.shape)
            raise UserError(f"experts[{slot}]: {source}: tensor {name} has shape {found}, expected {wanted}")
    if len(expert.tensors) != len(dense):
        raise UserError(
            f"experts[{slot}]: {source} has {len(expert.tensors) // 2} layers, the base {len(dense) // 2}"
        )
    if expert.info.base_llm != fingerprint:
        found, wanted = expert.info.base_llm[:12], fingerprint[:12]
        raise UserError(
            f"experts[{slot}]: {source} was trained from another LLM: fingerprint {found}, expected {wanted}"
        )
    slices = (model.config.moe or {})["experts"]["slices"]
    for index, layer in moe_layers(model).items():
        experts = layer.experts
        assert isinstance(experts, SwiGLUExperts)
        gate_up, down = (expert.tensors[f"layers.{index}.{name}"] for name in ("gate_up_proj", "down_proj"))
        cuts = cut_swiglu(gate_up, down, slices)
        with torch.no_grad():
            for place, (upper, lower) in enumerate(cuts, slot * slices):
                experts.gate_up_proj[place].copy_(upper)
                experts.down_proj[place].copy_(lower)
    places = {f"layers.{index}" for index in moe_layers(model)}
    learned = {
        name.rpartition(".")[0] for name, own in dense.items() if not torch.equal(own, expert.tensors[name])
    }
    if lost := len(learned - places):
        log.warning("%s: %d of its trained layers are not placed as MoE layers and are dropped", source, lost)


def _replace_connector(model: UniMoeForConditionalGeneration, kind: str, source: str):
    connectors = model.model.connectors
    if kind not in connectors:
        raise UserError(
            f"connectors.{kind}: the base has no {kind}; it has {', '.join(connectors) or 'no media'}"
        )
    tensors = load_connectors(source, kind)
    own = connectors[kind].state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        found = list(tensors[name].shape) if name in tensors else "nothing"
        wanted = list(own[name].shape) if name in own else "nothing"
        if found != wanted:
            raise UserError(
                f"connectors.{kind}: {source}: tensor {name} has shape {found}, expected {wanted}"
            )
    connectors[kind].load_state_dict(tensors)


def _sources(manifest: Manifest) -> list[str]:
    """Every source folder, once. Raises UserError for a missing one."""
    folders = [manifest.base, *(slot.source for slot in manifest.experts), *manifest.connectors.values()]
    folders = [folder for folder in dict.fromkeys(folders) if folder != BASE]
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"the manifest names {folder}, which is not a folder")
    return folders


def _data(manifest: Manifest) -> list[str]:
    """Every file of samples that slots name, once. Raises UserError for a missing one."""
    files = sorted({file for slot in manifest.experts for file in slot.data})
    for file in files:
        data_files(file)
    return files


def _names(cls: Any) -> list[str]:
    return [entry.name for entry in fields(cls)]


def _check_keys(where: str, content: dict[str, Any], known: list[str]):
    unknown = [str(key) for key in content if key not in known]
    if unknown:
        raise UserError(f"{where} unknown key {unknown[0]!r}; expected {', '.join(known)}")
