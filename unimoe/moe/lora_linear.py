"""Low-rank experts on the projections of any decoder, in banks that are added task by task.

Shapes: T tokens (leading dimensions flattened), D inputs and P outputs of a projection, E_b experts of bank
b, r rank of an expert, R = E_b * r.
"""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimoe.errors import UserError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a LLaMA-like block, all of which DyMoE adapts."""


class Gate(Protocol):
    """How much each expert says to each token."""

    def gate(self, x_TD: Tensor) -> Sequence[Tensor | None]:
        """For each bank the weights of its experts, [T, E_b] or, one for all tokens, [1, E_b]; None for 1."""
        ...


class OpenGate(nn.Module):
    """Every bank at weight 1: plain LoRA, or a sum of LoRAs."""

    def __init__(self, banks: nn.ModuleList):
        super().__init__()
        self._banks = (banks,)  # in a tuple, so that it is not registered twice

    def gate(self, x_TD: Tensor) -> list[None]:
        """None for each bank."""
        return [None] * len(self._banks[0])


class Bank(nn.Module):
    """E experts of rank r as one wide adapter: A [E r, D], B [P, E r]; expert e owns slice e of the rank.

    A starts Kaiming uniform (as peft) and B at zero, so a new bank changes nothing.
    """

    def __init__(self, base: nn.Linear, experts: int, rank: int):
        super().__init__()
        if experts < 1 or rank < 1:
            raise UserError(f"a bank of {experts} experts of rank {rank}; expected at least 1 of each")
        self.experts, self.rank = experts, rank
        weight = base.weight
        # adapters of a half-precision base are trained in float32, as peft does
        like = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        self.A = nn.Parameter(torch.empty(experts * rank, base.in_features, **like))
        self.B = nn.Parameter(torch.zeros(base.out_features, experts * rank, **like))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)

    def spread(self, weight_TE: Tensor | None, tokens: int) -> Tensor:
        """[T, R] weight of each rank: that of the expert which owns it."""
        if weight_TE is None:
            return self.A.new_ones(tokens, len(self.A))
        weight_TR = weight_TE.to(self.A.dtype).repeat_interleave(self.rank, dim=-1)
        return weight_TR.expand(tokens, -1)


class AdaptedLinear(nn.Module):
    """y = W0 x + b0 + scale * sum over banks b and their experts i of w_i B_i A_i x.

    1. the frozen projection
    2. ``gating`` says how much each expert counts for each token
    3. the banks that any token reaches run as one wide adapter, those that train apart from those that do
       not, of which no gradient is taken

    Banks are separate parameters: adding one copies nothing, and a frozen one stays as it is to the last bit.
    """

    def __init__(self, base: nn.Linear, scale: float, name: str):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale, self.name = scale, name
        self.banks = nn.ModuleList()
        self.gating: nn.Module | Gate = OpenGate(self.banks)

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def weight(self) -> Tensor:
        """That of the base; transformers reads it now and then for a dtype."""
        return self.base.weight

    def grow(self, experts: int, rank: int) -> Bank:
        """Add a bank of ``experts`` experts of ``rank``."""
        self.banks.append(Bank(self.base, experts, rank))
        return self.banks[-1]  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not len(self.banks):
            return y
        x_TD, y_TP = x.flatten(0, -2), y.flatten(0, -2)
        gates = self.gating.gate(x_TD)  # type: ignore[operator]
        reached = [
            (bank, weight_TE)
            for bank, weight_TE in zip(self.banks, gates, strict=True)
            if weight_TE is None or bool(weight_TE.detach().any())
        ]
        for _, several in groupby(reached, lambda pair: pair[0].A.requires_grad):
            y_TP = self._add(y_TP, x_TD, list(several))  # type: ignore[arg-type]
        return y_TP.reshape(y.shape)

    def _add(self, y_TP: Tensor, x_TD: Tensor, reached: list[tuple[Bank, Tensor | None]]) -> Tensor:
        """y plus what some banks say."""
        A_RD = _joined([bank.A for bank, _ in reached], 0)
        B_PR = _joined([bank.B for bank, _ in reached], 1)
        h_TR = self.scale * F.linear(x_TD.to(A_RD.dtype), A_RD)
        if any(weight_TE is not None for _, weight_TE in reached):
            weights = [bank.spread(weight_TE, len(x_TD)) for bank, weight_TE in reached]
            h_TR = h_TR * _joined(weights, 1).to(h_TR.dtype)
        if h_TR.dtype == y_TP.dtype:
            return torch.addmm(y_TP, h_TR, B_PR.T)
        return y_TP + F.linear(h_TR, B_PR).to(y_TP.dtype)

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}"


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Their concatenation; one alone is not copied."""
    return torch.cat([*parts], dim) if len(parts) > 1 else parts[0]


def adapt(
    decoder: nn.Module,
    targets: Sequence[str] = PROJECTIONS,
    layers: Sequence[int] | None = None,
    scale: float = 2.0,
) -> dict[str, AdaptedLinear]:
    """Wrap linear layers of a decoder in place, still without banks, and freeze everything else.

    Args:
        decoder: any module with blocks under ``layers.<i>``, such as a transformers decoder.
        targets: last names of the layers, or glob patterns on their full names.
        layers: indices of the blocks; None takes all.
        scale: alpha / r.

    Returns the wrapped layers by name, in order. Raises UserError for a target or a block that is nowhere.
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
        if not names:
            kinds = sorted({name.rpartition(".")[2] for name in linears})
            raise UserError(f"targets: no linear layer is named {target!r}; there are {', '.join(kinds)}")
        chosen |= names
    found = {name: AdaptedLinear(base, scale, name) for name, base in linears.items() if name in chosen}
    for name, layer in found.items():
        parent, _, child = name.rpartition(".")
        setattr(decoder.get_submodule(parent), child, layer)
    return found


def block_of(name: str) -> int:
    """Index of the decoder block that a layer's name lies in; -1 outside all."""
    match = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _matches(name: str, target: str) -> bool:
    return name.rpartition(".")[2] == target or fnmatchcase(name, target)


# -------------------------------------------------------------------- one budget for every strategy


def adapter_size(layer: AdaptedLinear, experts: int, rank: int, routed: bool) -> int:
    """Weights of a bank on one projection, with a router row per expert where it is routed."""
    routers = experts * layer.in_features if routed else 0
    return experts * rank * (layer.in_features + layer.out_features) + routers


def plain_rank(layer: AdaptedLinear, experts: int, rank: int) -> int:
    """Rank of a plain LoRA with as many weights as a routed bank of ``experts`` of ``rank``, rounded."""
    weights = adapter_size(layer, experts, rank, routed=True)
    return max(1, round(weights / (layer.in_features + layer.out_features)))
