"""``unimoe plan``: memory and communication of a stage on each device, from its settings alone.

The model is built as a stage builds it, but on the meta device, with the same parameters trained; so the
numbers of weights are exact. With P bytes of weights (float32; half of that with ``precision: bf16-true``), T
of those that train, n devices:

=====================  ==========================================================  =======================
on each device         ddp                                                         fsdp2
=====================  ==========================================================  =======================
weights                P                                                           P / n, towers that are
                                                                                   frozen whole
gradients              T                                                           T / n
AdamW                  2 T                                                         2 T / n
gathered               0                                                           what belongs to no
                                                                                   block, and two blocks
half-precision copies  P / 2 of the LLM with a mixed precision, kept by autograd   in ``gathered``
activations            what autograd keeps of a forward pass over the device's     the same
                       batch (:mod:`unimoe.analysis.activation_memory`), and the logits' gradient
sent in a step         2 T (n-1)/n                                                 (2 P + T) (n-1)/n, T
                                                                                   always in float32
=====================  ==========================================================  =======================

expert_parallel: experts are divided by e devices (as many as divide them), all else is as in fsdp2, and the
n / e devices with the same experts share them as in fsdp2. A token of H numbers goes to k experts and comes
back, forward and backward, in each of L layers: 4 L k H (e-1)/e numbers; experts' weights stay in place.

Not included: activations of towers and connectors, buffers of gradient accumulation, the CUDA context (about
1 GB) and fragmentation of the allocator, for which ``--reserve`` sets a share of the memory aside.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from unimoe.encoders import build_encoder
from unimoe.errors import UserError, first_line
from unimoe.model.build import connector_settings
from unimoe.model.configuration import UniMoeConfig
from unimoe.model.host import find_decoder
from unimoe.model.llm import add_placeholders
from unimoe.model.loading import STOCK_TYPES, build_on_meta
from unimoe.moe import MoELayer
from unimoe.moe.install import moe_layers
from unimoe.prepare.cache import resolve_part
from unimoe.stages.trainable import LoRA, Trainable, choose, frozen_towers

from .activation_memory import count_saved

Strategy = Literal["ddp", "fsdp2", "expert_parallel"]
GB = 1e9


@dataclass
class Sizes:
    """Number of weights, and of trained weights, by part of the model."""

    experts: tuple[int, int] = (0, 0)
    """Experts in the LLM's MoE layers, without routers."""
    blocks: tuple[int, int] = (0, 0)
    """Weights of the LLM's blocks, without the experts."""
    others: tuple[int, int] = (0, 0)
    """Embeddings, head, connectors, towers that train."""
    towers: tuple[int, int] = (0, 0)
    """Towers that are frozen."""
    largest_block: int = 0
    """Weights of the largest block, experts included."""
    largest_experts: int = 0
    """Weights of its experts."""

    @property
    def total(self) -> int:
        return self.experts[0] + self.blocks[0] + self.others[0] + self.towers[0]

    @property
    def trained(self) -> int:
        return self.experts[1] + self.blocks[1] + self.others[1]


@dataclass
class Batch:
    """The batch of a device."""

    tokens: int
    """Tokens of a batch."""
    accumulate: int = 1
    """Batches per optimizer step."""
    width: int = 4
    """Bytes per number in the forward pass."""
    stored: int = 4
    """Bytes per weight, gradient and number of AdamW's state."""
    activations: float = 0.0
    """Peak bytes."""


@dataclass
class Plan:
    """Bytes on each device under one strategy."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    """Gathered weights of the running blocks, or half-precision copies."""
    activations: float
    sent: float
    """Bytes that each device sends in an optimizer step, without the tokens of experts."""
    traffic: float
    """Bytes of tokens that each device sends to experts on others, and back, in an optimizer step."""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations


def plan(
    *,
    config: list[str],
    frame: list[str] | None = None,
    gpus: int = 8,
    memory: float = 80.0,
    tokens: int = 2048,
    reserve: float = 0.1,
) -> int:
    """Show the memory that a stage needs on each device. The exit status is 1 if no strategy fits.

    Args:
        config: YAML file(s) of the stage, as for unimoe fit.
        frame: configuration of the model that model.init_from will hold, if it does not exist yet: a
            config.json or the same as YAML, ours or of a multimodal model of transformers; of several files
            each overrides the one before it.
        gpus: devices.
        memory: memory of each GPU, in GB.
        tokens: tokens of each sample.
        reserve: share of the memory to set aside.
    """
    settings = read_settings(config)
    model = build_frame(settings["model"], frame)
    sizes = measure(model)
    batch = plan_batch(model, settings, tokens)
    rows, recompute = batch.tokens // tokens, settings["model"].get("gradient_checkpointing")
    stored = f"{batch.stored * sizes.total / GB:.2f} GB in {'float32' if batch.stored == 4 else '16 bits'}"
    print(f"{sizes.total:,} weights, {stored}; {sizes.trained:,} train")
    print(
        f"experts {sizes.experts[0]:,}, other weights of blocks {sizes.blocks[0]:,}, embeddings, head and "
        f"connectors {sizes.others[0]:,}, frozen towers {sizes.towers[0]:,}"
    )
    print(
        f"{gpus} devices of {memory:g} GB, {rows} samples of {tokens} tokens on each"
        + (f", {batch.accumulate} times a step" if batch.accumulate > 1 else "")
        + (", half precision" if batch.width == 2 else "")
        + (", blocks run again in the backward pass" if recompute else "")
    )
    plans = [make_plan(model, sizes, name, gpus, batch) for name in STRATEGIES]
    print(f"\n{'GB on each device':18}" + "".join(f"{name:>17}" for name in STRATEGIES))
    for row in ("weights", "gradients", "optimizer", "gathered", "activations", "total"):
        print(f"{row:18}" + "".join(f"{getattr(one, row) / GB:17.2f}" for one in plans))
    room = memory * (1 - reserve) * GB
    fits = [one.total <= room for one in plans]
    print(f"{f'fits {room / GB:.1f} GB':18}" + "".join(f"{'yes' if fit else 'NO':>17}" for fit in fits))
    print(f"\n{'GB sent in a step':18}" + "".join(f"{(one.sent + one.traffic) / GB:17.2f}" for one in plans))
    print(f"{'tokens of experts':18}" + "".join(f"{one.traffic / GB:17.2f}" for one in plans))
    return 0 if any(fits) else 1


STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp2", "expert_parallel")


def plan_batch(
    model: PreTrainedModel, settings: dict[str, Any], tokens: int, supervised: int | None = None
) -> Batch:
    """The batch of a device by a stage's settings, and its activations.

    Args:
        model: of :func:`build_frame`; its dtype becomes that of the forward pass.
        settings: of :func:`read_settings`.
        tokens: tokens of each sample.
        supervised: tokens of a sample that are learned (default: half of them).
    """
    trainer = settings.get("trainer", {})
    rows = int(settings.get("data", {}).get("batch_size", 8))
    precision = str(trainer.get("precision", "32"))
    half = precision.startswith(("bf16", "16"))
    nn.Module.to(model, torch.bfloat16 if half else torch.float32)
    saved = count_saved(model, rows, tokens, rows * (tokens // 2 if supervised is None else supervised))
    return Batch(
        rows * tokens,
        int(trainer.get("accumulate_grad_batches", 1)),
        2 if half else 4,
        2 if half and precision.endswith("true") else 4,
        saved.peak(bool(settings["model"].get("gradient_checkpointing", False))),
    )


def make_plan(model: PreTrainedModel, sizes: Sizes, strategy: Strategy, gpus: int, batch: Batch) -> Plan:
    """The bytes on each of ``gpus`` devices, by the formulas at the top of this file.

    ``sizes`` are those of the model.
    """
    width, stored = batch.width, batch.stored
    accumulate, activations = batch.accumulate, batch.activations
    send = (gpus - 1) / gpus
    if strategy == "ddp":
        copies = 2 * (sizes.total - sizes.towers[0]) if width < stored else 0
        weights, trained = float(stored * sizes.total), float(stored * sizes.trained)
        return Plan(weights, trained, 2 * trained, copies, activations, 2 * trained * send, 0)
    layers = list(moe_layers(model).values())
    share = 1
    if strategy == "expert_parallel" and layers:
        experts = layers[0].num_experts
        share = max(e for e in range(1, min(gpus, experts) + 1) if experts % e == 0 and gpus % e == 0)
    whole = [a + b for a, b in zip(sizes.blocks, sizes.others, strict=True)]
    weights = stored * ((sizes.total - sizes.towers[0]) / gpus + sizes.towers[0])
    trained = stored * sizes.trained / gpus
    block = sizes.largest_block - sizes.largest_experts + sizes.largest_experts / share
    gathered = width * (sizes.others[0] + 2 * block)
    away = gpus // share  # devices that hold shards of the same experts
    moved = width * (2 * whole[0] * send + 2 * sizes.experts[0] / share * (away - 1) / away) * accumulate
    moved += 4 * (whole[1] * send + sizes.experts[1] / share * (away - 1) / away) * accumulate
    hidden = model.config.get_text_config().hidden_size
    visits = sum(layer.most_experts_per_token for layer in layers)
    traffic = 4 * visits * hidden * width * batch.tokens * accumulate * (share - 1) / share
    return Plan(weights, trained, 2 * trained, gathered, activations, moved, traffic)


def measure(model: PreTrainedModel) -> Sizes:
    """Counts the weights, tied ones once."""
    seen: set[nn.Parameter] = set()

    def count(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
        new = [p for p in dict.fromkeys(parameters) if p not in seen]
        seen.update(new)
        return sum(p.numel() for p in new), sum(p.numel() for p in new if p.requires_grad)

    def add(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
        return one[0] + other[0], one[1] + other[1]

    sizes = Sizes()
    for block in find_decoder(model).layers:
        experts = [m.experts for m in block.modules() if isinstance(m, MoELayer)]
        own = count(p for one in experts for p in one.parameters())
        rest = count(block.parameters())
        sizes.experts, sizes.blocks = add(sizes.experts, own), add(sizes.blocks, rest)
        if own[0] + rest[0] > sizes.largest_block:
            sizes.largest_block, sizes.largest_experts = own[0] + rest[0], own[0]
    for tower in frozen_towers(model):
        sizes.towers = add(sizes.towers, count(tower.parameters()))
    sizes.others = count(model.parameters())
    return sizes


def build_frame(settings: dict[str, Any], frame: list[str] | None = None) -> PreTrainedModel:
    """The model of a stage on the meta device, with what trains chosen. Raises UserError where its
    configuration cannot be had."""
    model = build_on_meta(_configuration(settings, frame))
    with torch.device("meta"):
        choose(
            model,
            [Trainable(**entry) for entry in settings.get("trainable") or []],
            [LoRA(**entry) for entry in settings.get("lora") or []],
        )
    model.train()
    return model


def _configuration(settings: dict[str, Any], frame: list[str] | None) -> Any:
    modalities = {}
    for modality, parts in (settings.get("modalities") or {}).items():
        spec = {name: value for name, value in parts["encoder"].items() if name != "weights"}
        with torch.device("meta"):
            encoder = build_encoder(spec)
        modalities[modality] = {
            "encoder": encoder.config,
            "connector": connector_settings(encoder, parts["connector"]),
        }
    start = settings.get("init_from")
    if frame:
        values = _merged(frame, "--frame")
        config = _from_values(values.pop("model_type", UniMoeConfig.model_type), values)
    elif start is not None:
        if not (Path(start) / "config.json").is_file():
            raise UserError(
                f"model.init_from {start} holds no config.json yet; describe it with --frame FILE"
            )
        config = AutoConfig.from_pretrained(start)
    else:
        path = str(resolve_part(settings["llm"], "llm"))
        with torch.device("meta"):
            causal: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
            add_placeholders(causal, AutoTokenizer.from_pretrained(path), settings.get("chat_template"))
        config = UniMoeConfig(text_config=causal.config, moe=settings.get("moe"))
    if modalities:
        config.modalities = {**(config.modalities or {}), **modalities}
    return config


def _from_values(model_type: str, values: dict[str, Any]) -> Any:
    if model_type not in {UniMoeConfig.model_type, *STOCK_TYPES}:
        raise UserError(f"--frame: found a model of type {model_type!r}, expected a multimodal model")
    try:
        return AutoConfig.for_model(model_type, **values)
    except (TypeError, ValueError, KeyError, StrictDataclassError) as error:
        raise UserError(f"--frame: {first_line(error)}") from error


def read_settings(files: list[str]) -> dict[str, Any]:
    """The YAML files, each over the one before it. Raises UserError for one that is none."""
    merged = _merged(files, "--config")
    if "model" not in merged or merged.get("system", "stages") != "stages":
        raise UserError(f"{', '.join(files)}: expected a stage's settings (system stages, with a model)")
    return merged


def _merged(files: list[str], flag: str) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for file in files:
        try:
            text = Path(file).read_text(encoding="utf-8")
            # a YAML reader takes JSON's 1e-06 for text
            found = json.loads(text) if file.endswith(".json") else yaml.safe_load(text)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{flag} {file} cannot be read: {first_line(error)}") from error
        if not isinstance(found, dict):
            raise UserError(f"{flag} {file} holds no settings")
        _merge(merged, found)
    return merged


def _merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
