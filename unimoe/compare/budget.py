"""What a design costs, and the expert width at which it costs what the dense model does.

Only the FFNs of the placed layers count, with their routers: the rest is the same in all designs, but
for attention experts: what is measured counts them, widths are not matched for them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from unimoe.errors import UserError
from unimoe.moe import MoEConfig, MoELayer
from unimoe.moe.install import install_moe, moe_layers

from .config import Match
from .design import COPIES, Design

TOLERANCE = 0.02
ROUND = 0.005
"""Deviation at which a width that is a multiple of a power of two is preferred to the nearest."""
BYTES = 2
"""Bytes of a weight as it is stored: bfloat16."""


@dataclass(frozen=True)
class Cost:
    """Cost of the placed layers, or of a whole model."""

    active: float
    """Parameters that a token visits."""
    total: float
    bytes: float
    """Bytes of the weights as they are stored."""

    def over(self, other: "Cost", what: Match) -> float:
        """This cost relative to another; ``none`` compares active parameters."""
        name = "active" if what == "none" else what
        return getattr(self, name) / getattr(other, name)


class FFN(nn.Module):
    """A SwiGLU FFN as a decoder has it, to read weights from; it is never run."""

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)


class Stack(nn.Module):
    """FFNs in the places where a decoder has them."""

    def __init__(self, mlps: list[nn.Module], vocab_size: int = 0):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": mlp}) for mlp in mlps)


@dataclass(frozen=True)
class Frame:
    """The dense FFNs in the places of the experts."""

    hidden: int
    width: int
    layers: int
    """How many are replaced."""
    vocab_size: int

    def dense_cost(self) -> Cost:
        size = 3.0 * self.hidden * self.width * self.layers
        return Cost(size, size, BYTES * size)

    def cost(self, design: Design) -> Cost:
        """Cost of a design in these places, without data: a router whose number of experts depends on the
        token counts as at equal probabilities.

        Raises:
            UserError: the experts cannot be built.
        """
        if design.moe is None:
            return self.dense_cost()
        with torch.device("meta"):
            ffns = [FFN(self.hidden, design.width or self.width) for _ in range(self.layers)]
            stack = Stack(list(ffns), self.vocab_size)
            install_moe(stack, replace(design.moe, placement="all", attention=None))
        return measure(stack)


def measure(model: nn.Module, visits: dict[int, float] | None = None) -> Cost:
    """The cost of a model.

    Args:
        model: dense or with MoE layers.
        visits: measured mean number of experts with weights that a token visits, by MoE layer.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    idle, saved = 0.0, 0.0
    for index, layer in moe_layers(model).items():
        experts = sum(parameter.numel() for parameter in layer.experts.parameters())
        visited = layer.experts_per_token if visits is None else visits[index]
        idle += experts - layer.experts.active_parameters(visited)
        saved += BYTES * experts - _stored(layer)
    return Cost(total - idle, total, BYTES * total - saved)


def _stored(layer: MoELayer) -> float:
    """Bytes of a layer's experts; those that are packed when they are stored say how many."""
    packed: Any = getattr(layer.experts, "stored_bytes", None)
    size = sum(parameter.numel() for parameter in layer.experts.parameters())
    return BYTES * size if packed is None else packed()


def fit_width(design: Design, frame: Frame, match: Match, from_scratch: bool) -> Design:
    """The design with the expert width at which it costs what dense costs.

    From scratch an expert may have any width. Upcycled experts are slices of the FFN: the number of experts
    and the router stay, and the FFN is cut into as many slices as it takes. Then each expert's output is
    weighted by that number, and a ``top_k`` router chooses as many experts of each slice (``groups: slices``)
    where its k allows it. The control ``copies_top2`` of an upcycled base stays as it is, at its own cost.

    Raises:
        UserError: there is no such width.
    """
    if match == "none" or design.moe is None or (design.name == COPIES and not from_scratch):
        return design
    dense = frame.dense_cost()

    def ratio(one: Design) -> float:
        return frame.cost(one).over(dense, match)

    if abs(ratio(design) - 1) <= TOLERANCE:
        return design
    found = _any_width(design, ratio) if from_scratch else _slices(design, frame, ratio)
    if abs(ratio(found) - 1) > TOLERANCE:
        width = (found.width or frame.width) // (found.moe or design.moe).experts["slices"]
        raise UserError(
            f"no width of its {design.moe.num_experts} experts matches dense in {match} "
            f"{'parameters' if match != 'bytes' else 'of weights'} within 2 %: the nearest, {width}, gives "
            f"{ratio(found):.3f} times as many; change its experts or its router, or set match: none"
        )
    return found


def _any_width(design: Design, ratio: Callable[[Design], float]) -> Design:
    """A multiple of 16, 8, 4 or 2 where one is near enough, else the nearest width; costs grow on a line."""
    assert design.moe is not None
    slices = design.moe.experts["slices"]

    def at(width: int) -> Design:
        return replace(design, width=width * slices)

    one, two = ratio(at(16)), ratio(at(32))
    exact = 16 + 16 * (1 - one) / (two - one)
    for step in (16, 8, 4, 2, 1):
        below = step * int(exact // step)
        best = min((at(max(1, width)) for width in (below, below + step)), key=lambda d: abs(ratio(d) - 1))
        if abs(ratio(best) - 1) <= ROUND:
            break
    return best


def _slices(design: Design, frame: Frame, ratio: Callable[[Design], float]) -> Design:
    """The number of slices that comes nearest, of those that divide the FFN and the number of experts, and
    that the router and the shared experts allow."""
    assert design.moe is not None
    experts = design.moe.num_experts
    ratios: list[tuple[float, Design]] = [(abs(ratio(design) - 1), design)]
    for slices in range(1, experts + 1):
        if experts % slices == 0 and frame.width % slices == 0:
            try:
                cut = _in_slices(design, slices)
                ratios.append((abs(ratio(cut) - 1), cut))
            except UserError:  # shared experts that are too wide, or a k that is no multiple
                continue
    return min(ratios, key=lambda pair: pair[0])[1]


def _in_slices(design: Design, slices: int) -> Design:
    assert design.moe is not None
    given = design.moe.to_dict()
    given["experts"] |= {"copies": design.moe.num_experts // slices, "slices": slices}
    if slices > 1 and given["combine"] == "weight":
        given["combine"] = "slices"
    router = given["router"]
    if (
        slices > 1
        and router.get("groups", 0) is None
        and isinstance(router["k"], int)
        and router["k"] % slices == 0
    ):
        router["groups"] = "slices"
    return replace(design, moe=MoEConfig.from_dict(given))
