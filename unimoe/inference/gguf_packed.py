"""Packed weights as blocks of GGUF, with the codes and scales that they have.

A block holds 32 weights of one scale in float16: ``Q4_0`` codes from -8 to 7, ``Q8_0`` codes from -128 to
127. So 1 to 4 bits fit into the one, 8 into the other, and a group of 64 weights is two blocks.

Shapes: E experts, O outputs, K inputs, G groups of a row.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimoe.kernels.packed import Stack
from unimoe.moe.experts.packed import PackedExperts
from unimoe.moe.packed_linear import PackedLinear

BLOCK = 32
"""Weights of a block."""


@dataclass(frozen=True)
class Coded:
    """Codes and scales of a matrix or of a stack of them."""

    codes: Tensor
    """[..., O, K] int8."""
    scales: Tensor
    """[..., O, G]."""

    def blocks(self, bits: int) -> np.ndarray:
        """[..., O, bytes of a row] uint8: Q4_0 for up to 4 bits, else Q8_0."""
        codes = self.codes.cpu().unflatten(-1, (-1, BLOCK))
        scales = self.scales.cpu().to(torch.float16)
        scales = scales.repeat_interleave(codes.shape[-2] // scales.shape[-1], -1)[..., None].contiguous()
        if bits <= 4:
            unsigned = (codes.to(torch.int16) + 8).to(torch.uint8)
            body = unsigned[..., : BLOCK // 2] | unsigned[..., BLOCK // 2 :] << 4
        else:
            body = codes.contiguous().view(torch.uint8)
        return torch.cat([scales.view(torch.uint8), body], -1).flatten(-2).numpy()


@dataclass(frozen=True)
class Named:
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], "Tensor | Coded"]
    """Makes it when it is written."""
    bits: int | None = None
    """Bits of a packed tensor."""


def matrix(name: str, module: Any, order: Any = slice(None)) -> Named:
    """The weight of a linear layer or an embedding, packed or not, its rows in an ``order``."""
    if not isinstance(module, PackedLinear):
        return Named(name, tuple(module.weight.shape), lambda: module.weight[order])
    shape = (module.out_features, module.in_features)
    return Named(name, shape, lambda: Coded(*(one[order] for one in module.stack().unpack(0))), module.bits)


def packed_experts(block: str, experts: PackedExperts, null: int) -> Iterator[Named]:
    """The three stacks of packed experts, with ``null`` experts of zeros behind."""
    (gate_up, down), width = experts.stacks(), experts.intermediate_size
    count, bits = experts.num_experts + null, max(experts.expert_bits)

    def part(stack: Stack, rows: slice) -> Coded:
        unpacked = [stack.unpack(expert) for expert in range(experts.num_experts)]
        pairs = zip(*unpacked, strict=True)
        stacked = (torch.stack([one[rows] for one in values]) for values in pairs)
        return Coded(*(F.pad(one, (0, 0, 0, 0, 0, null)) for one in stacked))

    inner, outer = (count, width, experts.hidden_size), (count, experts.hidden_size, width)
    yield Named(f"{block}.ffn_gate_exps.weight", inner, lambda: part(gate_up, slice(width)), bits)
    yield Named(f"{block}.ffn_up_exps.weight", inner, lambda: part(gate_up, slice(width, None)), bits)
    yield Named(f"{block}.ffn_down_exps.weight", outer, lambda: part(down, slice(None)), bits)


def odd_group(model: nn.Module) -> int | None:
    """The group of packed weights that blocks cannot be cut of, if there is one."""
    groups = {one.group for one in model.modules() if isinstance(one, PackedExperts | PackedLinear)}
    return next((group for group in sorted(groups) if group % BLOCK), None)
