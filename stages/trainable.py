"""What a stage trains: parameters chosen by name patterns, and LoRA adapters, which are merged at its end."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from unimoe.errors import UserError
from unimoe.model.host import decoder_name, front, is_stock
from unimoe.moe import LoRAExperts, MoELayer, SwiGLUExperts
from unimoe.moe.install import frozen_parameters

log = logging.getLogger(__name__)


@dataclass
class Trainable:
    """Parameters that train in full."""

    match: str | list[str]
    """Glob pattern(s) on parameter names, such as ``model.connectors.*`` or ``*.mlp.router.*``."""

    lr: float
    """Peak learning rate."""


@dataclass
class LoRA:
    """Low-rank adapters on one kind of weight of the language model."""

    layers: Literal["attention", "ffn", "experts"]
    """Linear layers of attention, linear layers of dense FFNs, or the MoE layers' experts (one adapter
    each)."""

    rank: int = 16
    """Rank r of the update."""

    alpha: float = 32.0
    """The update is scaled by alpha / rank."""

    dropout: float = 0.0
    """Dropout on the adapter's input; must be 0 for experts."""

    lr: float = 2e-4
    """Peak learning rate."""

    match: str | list[str] = "*"
    """Only modules whose names match these glob pattern(s), such as ``*.q_proj``."""


@dataclass
class TrainableConfig:
    """What trains; everything else is frozen."""

    trainable: list[Trainable] | None = None
    """Parameters that train in full, by name pattern."""

    lora: list[LoRA] | None = None
    """Adapters, merged into the weights at the end."""


@dataclass
class Group:
    """Parameters that share a learning rate."""

    name: str
    """Name in logs."""

    lr: float
    """Peak learning rate."""

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    """The parameters by name."""

    def size(self) -> int:
        """Number of weights."""
        return sum(parameter.numel() for parameter in self.parameters.values())


def choose(model: nn.Module, trainable: list[Trainable], lora: list[LoRA]) -> list[Group]:
    """Freeze ``model``, add the adapters, and unfreeze what a stage trains.

    A parameter that several patterns match belongs to the first. Frozen shared experts stay frozen.

    Returns:
        One group for each entry, the adapters' last.

    Raises:
        UserError: a pattern or an adapter finds nothing to train.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    groups = []
    taken = frozen_parameters(model)
    for entry in trainable:
        found = [p for p, name in names.items() if _matches(name, entry.match) and p not in taken]
        if not found:
            examples = ", ".join(sorted({_shorten(name) for name in names.values()})[:8])
            raise UserError(
                f"trainable: nothing is named {entry.match!r}, or all of it is taken; there are {examples}"
            )
        for pattern in [entry.match] if isinstance(entry.match, str) else entry.match:
            if not any(fnmatchcase(name, pattern) for name in names.values()):
                log.warning("trainable: %r matches no parameter of this model", pattern)
        taken.update(found)
        groups.append(Group(_label(entry.match), entry.lr, {names[p]: p for p in found}))

    added = add_lora(model, lora)
    for entry, modules in zip(lora, added, strict=True):
        group = Group(f"lora_{entry.layers}", entry.lr)
        for prefix, module in modules.items():
            own = {f"{prefix}.{name}": p for name, p in module.named_parameters() if "lora_" in name}
            group.parameters.update(own)
        groups.append(group)

    model.requires_grad_(False)  # again: peft switches its adapters on by itself
    for group in groups:
        for parameter in group.parameters.values():
            parameter.requires_grad_(True)
    if not groups:
        raise UserError("nothing trains in this stage: give model.trainable or model.lora")
    return groups


def frozen_towers(model: Any) -> list[nn.Module]:
    """Towers of which nothing trains. FSDP2 leaves them whole: they may run on one process and not on
    another."""
    towers = front(model) if is_stock(model) else model.model.encoders.values()
    return [tower for tower in towers if not any(p.requires_grad for p in tower.parameters())]


def add_lora(model: nn.Module, lora: list[LoRA]) -> list[dict[str, nn.Module]]:
    """Put adapters into ``model`` in place.

    Returns:
        The adapted modules of each entry, by name.

    Raises:
        UserError: an entry matches no layer, or has a dropout that its layers do not support.
    """
    linear: dict[str, LoRA] = {}
    added: list[dict[str, nn.Module]] = []
    for entry in lora:
        targets = [
            name
            for name in _targets(model, entry.layers)
            if _matches(name, entry.match) and name not in linear
        ]
        if not targets:
            raise UserError(f"lora: the model has no {entry.layers} layer named {entry.match!r} to adapt")
        if entry.layers == "experts":
            if entry.dropout:
                raise UserError(f"lora on experts takes no dropout, found {entry.dropout}; set it to 0")
            for name in targets:
                _wrap_experts(model.get_submodule(name), entry)
            targets = [f"{name}.experts" for name in targets]
        else:
            linear.update(dict.fromkeys(targets, entry))
        added.append(dict.fromkeys(targets, model))
    if linear:
        _inject(model, linear)
    return [{name: model.get_submodule(name) for name in names} for names in added]


def merge_lora(model: nn.Module) -> nn.Module:
    """Merge every adapter into the weight it adapts (W + alpha / r B A), in place, and remove it."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer) and isinstance(module, nn.Module):
            module.merge(safe_merge=True)  # raises on a merge that gives NaN
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
        elif isinstance(module, MoELayer) and isinstance(module.experts, LoRAExperts):
            module.experts = module.experts.merge()
    return model


def _inject(model: nn.Module, linear: dict[str, LoRA]):
    dropouts = {entry.dropout for entry in linear.values()}
    if len(dropouts) > 1:
        raise UserError(f"lora on attention and ffn must share one dropout, found {sorted(dropouts)}")
    first = next(iter(linear.values()))
    config = LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,  # type: ignore[arg-type]  # peft only divides it by the rank
        lora_dropout=first.dropout,
        target_modules=list(linear),
        rank_pattern={f"^{name}$": entry.rank for name, entry in linear.items()},
        alpha_pattern={f"^{name}$": entry.alpha for name, entry in linear.items()},  # type: ignore[arg-type]
    )
    inject_adapter_in_model(config, model)


def _wrap_experts(layer: nn.Module, entry: LoRA):
    experts = layer.experts
    if not isinstance(experts, SwiGLUExperts):
        raise UserError(f"lora on experts adapts SwiGLUExperts, found {type(experts).__name__}")
    layer.experts = LoRAExperts(experts, entry.rank, entry.alpha)


def _targets(model: nn.Module, kind: str) -> Iterator[str]:
    """Names of the language model's modules of one kind, in order."""
    inside = decoder_name(model) + "."
    inside_moe: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, MoELayer):
            inside_moe += (name + ".",)
            if kind == "experts":
                yield name
        elif isinstance(module, nn.Linear) and name.startswith(inside) and not name.startswith(inside_moe):
            in_attention = "attn" in name or "attention" in name
            if kind == ("attention" if in_attention else "ffn"):
                yield name


def _matches(name: str, patterns: str | list[str]) -> bool:
    return any(fnmatchcase(name, p) for p in ([patterns] if isinstance(patterns, str) else patterns))


def _label(match: str | list[str]) -> str:
    first = match if isinstance(match, str) else match[0]
    words = [word for word in first.split(".") if word not in ("*", "model", "")]
    return "_".join(words).replace("*", "") or "all"


def _shorten(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split(".")[:6])
