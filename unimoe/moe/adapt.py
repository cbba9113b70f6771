"""Wrapping the linear layers of a decoder, so that they can take banks of low-rank experts."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from unimoe.errors import UserError

from .lora_linear import LoRALinear, block_of

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a LLaMA-like block, all of which DyMoE adapts."""

FUSED = {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
}
"""One layer in place of several, as GLM and Phi have."""


def adapt(
    decoder: nn.Module,
    targets: Sequence[str] = PROJECTIONS,
    layers: Sequence[int] | None = None,
    scale: float = 2.0,
) -> dict[str, LoRALinear]:
    """Wrap linear layers of a decoder in place, still without banks, and freeze everything else.

    Args:
        decoder: any module with blocks under ``layers.<i>``, such as a transformers decoder.
        targets: last component of the layers' names, or glob patterns on the full names; where there is no
            layer of the name, the one into which it is fused.
        layers: indices of the blocks; None takes all.
        scale: alpha / r.

    Returns:
        The wrapped layers by name, in order.

    Raises:
        UserError: for a target that matches nothing or a block that does not exist.
    """
    decoder.requires_grad_(False)
    linears = {
        name: module
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and block_of(name) >= 0
    }
    if layers is not None:
        blocks = {block_of(name) for name in linears}
        if not layers or not blocks.issuperset(layers):
            raise UserError(f"layers: expected blocks out of 0 to {max(blocks)}, found {list(layers)}")
        linears = {name: module for name, module in linears.items() if block_of(name) in layers}
    chosen: set[str] = set()
    for target in targets:
        names = {name for name in linears if _matches(name, target)}
        names = names or {name for name in linears if _matches(name, FUSED.get(target, target))}
        if not names:
            kinds = sorted({name.rpartition(".")[2] for name in linears})
            raise UserError(f"targets: no linear layer is named {target!r}; there are {', '.join(kinds)}")
        chosen |= names
    found = {name: LoRALinear(base, scale, name) for name, base in linears.items() if name in chosen}
    for name, layer in found.items():
        parent, _, child = name.rpartition(".")
        setattr(decoder.get_submodule(parent), child, layer)
    return found


def _matches(name: str, target: str) -> bool:
    return name.rpartition(".")[2] == target or fnmatchcase(name, target)
