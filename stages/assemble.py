"""``unimoe assemble``: build a mixture of experts from a base model and expert folders by a manifest.

    base: runs/align                  # a dense model folder; everything but the experts comes from it
    experts:                          # one slot each, in order; or a number of copies of the base's FFNs
      - {name: words, from: base, data: text.jsonl}     # from: base, an expert folder, or a dense model's
      - {name: image, from: runs/expert_image, data: [names.jsonl, questions.jsonl]}
    connectors: {image: runs/expert_image}   # default: the base's own
    moe:                              # unimoe.moe.MoEConfig without experts.copies, or a preset
      router: {kind: top_k, k: 2}
      experts: {slices: 2}            # split each slot's FFNs into two experts
      placement: interval
    routers: {scale: 6}               # initialisation where slots name data, see router_start.py
    importance: text.jsonl            # samples that say which units matter, for moe.experts.kind: importance
    average: false                    # true: what has no experts becomes the mean of the slots' models
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

from unimoe.artifacts import StageRecord, check_same, clear, flatten, folder_hash, read_record, write_result
from unimoe.data.read import data_files, data_hashes
from unimoe.errors import UserError
from unimoe.model.loading import find_model, load_model
from unimoe.model.modeling import UniMoeForConditionalGeneration
from unimoe.model.processing import UniMoeProcessor
from unimoe.moe import MoEConfig, install_moe
from unimoe.moe.install import moe_layers
from unimoe.moe.settings import merge, parse_settings

from .experts_file import load_connectors
from .importance import measure_units
from .router_start import RouterStart, start_routers
from .slot_models import slot_decoders

log = logging.getLogger(__name__)

KINDS: dict[str, Any] = {
    "connectors": dict,
    "moe": dict,
    "routers": dict,
    "average": bool,
    "importance": str | list,
    "seed": int,
}
"""Key of a manifest -> its type."""
BASE = "base"
"""The source of a slot or connector that stays the base model's own."""


@dataclass
class Slot:
    """One expert of every MoE layer."""

    name: str
    """Name in reports."""

    source: str = BASE
    """``base``, an expert folder, or the folder of a dense model (``from`` in the manifest)."""

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

    importance: list[str] = field(default_factory=list)
    """Files of samples on which the units' importance is measured, for experts of that kind."""

    average: bool = False
    """Whether the LLM's weights without experts become the mean over the slots' models (BTX, BAM); expert
    folders count as the base."""

    seed: int = 0
    """Seed of fresh routers, and of the choice of their samples."""

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
    # None where a manifest written before they existed has nothing
    later = {"average": parsed.average or None, "importance": parsed.importance or None}
    settings = {**flatten({**asdict(parsed), "output": None, **later}), **content}
    if overwrite:
        clear(folder)
    done = read_record(folder)
    if done is not None:
        check_same(folder, done.settings, settings)
        log.info("%s is finished: assembled with this manifest before", folder)
        return

    cache = folder.parent / "features"
    model, processor = put_together(parsed, cache)
    if parsed.experts[0].data:
        slots = [slot.data for slot in parsed.experts]
        start_routers(model, processor, slots, parsed.routers, cache, parsed.seed)
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


def put_together(
    manifest: Manifest, cache: str | Path
) -> tuple[UniMoeForConditionalGeneration, UniMoeProcessor]:
    """Build the model of a manifest in memory; ``cache`` is the folder of the frozen encoders' features.

    Raises:
        UserError: a part does not fit the base.
    """
    model, processor = load_model(manifest.base, "base", torch.float32, "cpu", hub=False)
    if model.config.moe:
        raise UserError(f"base: {manifest.base} is a mixture of experts already; expected a dense model")
    moe = mixture(manifest)
    decoder: Any = model.model.language_model
    placed = moe.layers(len(decoder.layers))
    if manifest.importance:
        if moe.experts["kind"] != "importance":
            kind = moe.experts["kind"]
            raise UserError(f"importance: found experts of kind {kind}, expected importance; leave it out")
        measure_units(model, processor, manifest.importance, placed, cache, manifest.seed)
    folders = [None if slot.source == BASE else slot.source for slot in manifest.experts]
    sources = slot_decoders(model, folders, placed, manifest.average)
    with torch.random.fork_rng():
        torch.manual_seed(manifest.seed)
        install_moe(decoder, moe, sources)  # with fresh routers
    model.config.moe = moe.to_dict()
    for modality, source in manifest.connectors.items():
        if source != BASE:
            _replace_connector(model, modality, source)
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
    for key, kind in KINDS.items():
        if key in content and not isinstance(content[key], kind):
            wanted = getattr(kind, "__name__", kind)
            raise UserError(f"{path}: {key} must be of type {wanted}, found {content[key]!r}")
    routers = content.get("routers", {})
    _check_keys(f"{path}: routers:", routers, _names(RouterStart))
    slots = _slots(path, content.get("experts"))
    importance = content.get("importance", [])
    content["importance"] = [importance] if isinstance(importance, str) else importance
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


def _replace_connector(model: UniMoeForConditionalGeneration, modality: str, source: str):
    connectors = model.model.connectors
    if modality not in connectors:
        raise UserError(
            f"connectors.{modality}: the base has no {modality}; it has {', '.join(connectors) or 'no media'}"
        )
    tensors = load_connectors(source, modality)
    own = connectors[modality].state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        found = list(tensors[name].shape) if name in tensors else "nothing"
        wanted = list(own[name].shape) if name in own else "nothing"
        if found != wanted:
            raise UserError(
                f"connectors.{modality}: {source}: tensor {name} has shape {found}, expected {wanted}"
            )
    connectors[modality].load_state_dict(tensors)


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
    files = sorted({*manifest.importance, *(file for slot in manifest.experts for file in slot.data)})
    for file in files:
        data_files(file)
    return files


def _names(cls: Any) -> list[str]:
    return [entry.name for entry in fields(cls)]


def _check_keys(where: str, content: dict[str, Any], known: list[str]):
    unknown = [str(key) for key in content if key not in known]
    if unknown:
        raise UserError(f"{where} unknown key {unknown[0]!r}; expected {', '.join(known)}")
