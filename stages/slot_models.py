"""What the slots of a mixture are made of: the base, expert folders, and folders of dense models."""

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unimoe.errors import UserError
from unimoe.model.loading import load_model
from unimoe.model.modeling import UniMoeForConditionalGeneration
from unimoe.moe.install import dense_mlp
from unimoe.moe.upcycle.average import average_weights

from .experts_file import Expert, base_fingerprint, ffn_tensors, load_expert

log = logging.getLogger(__name__)

PARTS = ("model.language_model", "lm_head")
"""The LLM: modules that are averaged."""


def slot_decoders(
    model: UniMoeForConditionalGeneration, folders: Sequence[str | None], placed: Sequence[int], average: bool
) -> list[Any]:
    """One dense decoder of each slot, for :func:`~unimoe.moe.install.install_moe`.

    Args:
        model: the base, dense.
        folders: an expert folder or the folder of a dense model; None is the base.
        placed: decoder layers that become MoE layers.
        average: give ``model``, in place, the mean of the slots' LLMs; an expert folder counts as the base.

    Raises:
        UserError: a folder is neither, or does not fit the base.
    """
    dense, decoder, base = ffn_tensors(model), model.model.language_model, base_fingerprint(model)
    own = {name: model.get_submodule(name) for name in PARTS}
    seed = copy.deepcopy(own) if average else own
    llms, decoders = [], []
    for slot, folder in enumerate(folders):
        llm, found = seed, seed[PARTS[0]]
        if folder is not None and _is_model(folder):
            llm = _dense_model(slot, folder, len(decoder.layers))  # type: ignore[arg-type]
            found = llm[PARTS[0]]
            if not average:
                log.warning("%s: only its experts are used; average: true mixes in the rest", folder)
        elif folder is not None:
            act_fn = getattr(dense_mlp(decoder, 0), "act_fn", None)
            found = _specialist(slot, folder, dense, base, placed).decoder(act_fn)
        llms.append(llm)
        decoders.append(found)
    if average:
        for name in PARTS:
            average_weights(own[name], [llm[name] for llm in llms])
    return decoders


def _is_model(folder: str) -> bool:
    return (Path(folder) / "config.json").is_file() and not (Path(folder) / "expert.json").is_file()


def _dense_model(slot: int, source: str, layers: int) -> dict[str, Any]:
    """The averaged parts of a dense model's folder. Raises UserError if it does not fit the base."""
    model = load_model(source, f"experts[{slot}]", torch.float32, "cpu", hub=False)[0]
    found: Any = model.model.language_model
    if model.config.moe or len(found.layers) != layers:
        kind = "a mixture of experts" if model.config.moe else f"of {len(found.layers)} layers"
        raise UserError(f"experts[{slot}]: {source} is {kind}, expected a dense model of {layers} layers")
    return {name: model.get_submodule(name) for name in PARTS}


def _specialist(
    slot: int, source: str, base: dict[str, Tensor], fingerprint: str, placed: Sequence[int]
) -> Expert:
    """The expert folder of one slot; ``base`` holds the base's FFNs. Raises UserError if it does not fit."""
    expert = load_expert(source)
    for name, own in base.items():
        found = list(expert.tensors[name].shape) if name in expert.tensors else "nothing"
        if found != list(own.shape):
            wanted = list(own.shape)
            raise UserError(f"experts[{slot}]: {source}: tensor {name} has shape {found}, expected {wanted}")
    if len(expert.tensors) != len(base):
        raise UserError(
            f"experts[{slot}]: {source} has {len(expert.tensors) // 2} layers, the base {len(base) // 2}"
        )
    if expert.info.base_llm != fingerprint:
        found, wanted = expert.info.base_llm[:12], fingerprint[:12]
        raise UserError(
            f"experts[{slot}]: {source} was trained from another LLM: fingerprint {found}, expected {wanted}"
        )
    learned = {
        name.rpartition(".")[0] for name, own in base.items() if not torch.equal(own, expert.tensors[name])
    }
    if lost := len(learned - {f"layers.{index}" for index in placed}):
        log.warning("%s: %d of its trained layers are not placed as MoE layers and are dropped", source, lost)
    return expert
