"""Experts that start as slices of an FFN's hidden dimension (Dynamic-DINO's MoE-Tuning, UniMoE-Audio).

The MoE layer starts as exactly the dense FFN where a token visits all slices of one copy and their outputs
are summed unweighted.

Shapes: E experts, H hidden, I intermediate.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unimoe.errors import UserError
from unimoe.moe.experts.ffn import FFNExperts
from unimoe.moe.experts.swiglu import SwiGLUExperts
from unimoe.moe.parts import EXPERTS
from unimoe.moe.routers.top_k import TopK

from .read import read_ffn, read_gate, read_swiglu


@EXPERTS.register(
    "swiglu",
    source="sparse upcycling, arXiv 2212.05055; slices: UniMoE-Audio, arXiv 2510.13344",
    axis="FFN",
    exact="whole copies, or all slices of one copy",
)
def split_experts(mlps: Sequence[nn.Module], slices: int, noise: float = 0.0) -> SwiGLUExperts:
    """Each of several dense FFNs of one shape cut in ``slices`` equal parts, an expert each (UniMoE-Audio,
    arXiv 2510.13344: 4 specialists, 2 slices, 8 experts).

    Expert m*slices + s is slice s of model m. One model many times over is exact as ``copy_experts`` or
    ``slice_experts`` say.

    Args:
        mlps: the FFNs.
        slices: of each.
        noise: Gaussian noise on each expert's weights, in standard deviations of each weight matrix.

    Raises:
        UserError: an FFN is not a bias-free gated FFN, has another shape or activation, or cannot be cut
            evenly.
    """
    if not mlps:
        raise UserError("no dense FFN to make experts from, expected at least one")
    read = {mlp: read_swiglu(mlp) for mlp in mlps}  # once, where one model stands in every slot
    weights = [read[mlp] for mlp in mlps]
    shape, act = weights[0][1].shape, read_gate(mlps[0])
    for slot, (_, down) in enumerate(weights):
        if down.shape != shape:
            found, expected = list(down.shape), list(shape)
            raise UserError(
                f"the FFN for expert {slot} has down_proj {found}, expected {expected} as expert 0 has"
            )
        if (found := read_gate(mlps[slot])) != act:
            raise UserError(
                f"the FFN for expert {slot} has the activation {found}, expected {act} as expert 0 has"
            )
    cuts = [cut for gate_up, down in weights for cut in cut_swiglu(gate_up, down, slices)]
    return _stack([gate_up for gate_up, _ in cuts], [down for _, down in cuts], noise, act)


def slice_experts(mlp: nn.Module, slices: int, copies: int = 1, noise: float = 0.0) -> SwiGLUExperts:
    """Cuts the hidden dimension I of ``copies`` copies of one FFN in ``slices`` equal parts: slices*copies
    experts of width I/slices.

    Exact when a token visits all slices of one copy and they are summed unweighted (combine "indicator",
    "straight_through", or "k_weight" with equal weights). Expert c*slices + s is slice s of copy c;
    ``repeat_router`` makes a router that picks whole copies.
    """
    return split_experts([mlp] * copies, slices, noise)


@EXPERTS.register(
    "ffn",
    source="Dynamic-DINO, arXiv 2507.17436, section 3",
    axis="FFN",
    exact="whole copies, or all slices of one copy",
)
def split_ffns(mlps: Sequence[nn.Module], slices: int, noise: float = 0.0) -> FFNExperts:
    """:func:`split_experts` for two-layer FFNs with biases, as detection transformers have them: the rows of
    the first layer and its bias are cut, and every slice gets 1/slices of the last bias.

    Args:
        mlps: the FFNs.
        slices: of each.
        noise: Gaussian noise on each expert's weights, in standard deviations of each weight matrix.

    Raises:
        UserError: an FFN is no two-layer FFN, or cannot be cut evenly.
    """
    stacks: dict[str, list[Tensor]] = {}
    hidden, width, act = 0, 0, ""
    for mlp in mlps:
        (up, up_bias, down, down_bias), act = read_ffn(mlp)
        hidden, width = down.shape[0], _slice_width(down.shape[1], slices)
        for name, stack in {
            "up_proj": up.unflatten(0, (slices, width)),
            "up_bias": up_bias.unflatten(0, (slices, width)),
            "down_proj": torch.stack(down.split(width, dim=1)),
            "down_bias": (down_bias / slices).expand(slices, -1),
        }.items():
            stacks.setdefault(name, []).append(stack)
    with torch.device("meta"):
        experts = FFNExperts(slices * len(mlps), hidden, width, act=act)
    for name, parts in stacks.items():
        # biases may all be zero: noise on weights only
        weight = torch.cat(parts)
        setattr(experts, name, nn.Parameter(_noisy(weight, noise) if name.endswith("proj") else weight))
    return experts


def slice_ffn(mlp: nn.Module, slices: int, copies: int = 1, noise: float = 0.0) -> FFNExperts:
    """``slice_experts`` for a two-layer FFN with biases."""
    return split_ffns([mlp] * copies, slices, noise)


def leading_slices(mlp: nn.Module, count: int, width: int) -> SwiGLUExperts:
    """The first ``count`` slices of ``width`` of one FFN: shared experts narrower than the others."""
    gate_up, down = read_swiglu(mlp)
    inner = down.shape[1]
    if width < 1 or count * width > inner:
        raise UserError(f"{count} shared experts of width {width} need more than the FFN's {inner}")
    (gate, up), kept = gate_up.chunk(2), count * width
    cuts = cut_swiglu(torch.cat([gate[:kept], up[:kept]]), down[:, :kept], count)
    return _stack([gate_up for gate_up, _ in cuts], [down for _, down in cuts], 0.0, read_gate(mlp))


def cut_swiglu(gate_up: Tensor, down: Tensor, slices: int) -> list[tuple[Tensor, Tensor]]:
    """(gate_up [2I/slices, H], down [H, I/slices]) of each slice of an FFN's hidden dimension."""
    if slices == 1:
        return [(gate_up, down)]
    gate, up = gate_up.chunk(2)
    width = _slice_width(down.shape[1], slices)
    parts = zip(gate.split(width), up.split(width), down.split(width, dim=1), strict=True)
    return [(torch.cat([gate, up]), down) for gate, up, down in parts]


@torch.no_grad()
def repeat_router(router: TopK, slices: int) -> None:
    """Gives the ``slices`` slices of each copy the logits of the copy's first slice, in place, so that top-k
    takes whole copies."""
    if router.num_experts % slices:
        raise UserError(
            f"the router has {router.num_experts} experts, expected a multiple of {slices} slices"
        )
    router.weight.copy_(router.weight[::slices].repeat_interleave(slices, dim=0))


def _slice_width(inner: int, slices: int) -> int:
    if slices < 1 or inner % slices:
        raise UserError(
            f"cannot cut an FFN of width {inner} in {slices} slices, expected a divisor of {inner}"
        )
    return inner // slices


def _stack(gate_ups: list[Tensor], downs: list[Tensor], noise: float, act: str) -> SwiGLUExperts:
    hidden, inner = downs[0].shape
    with torch.device("meta"):
        experts = SwiGLUExperts(len(downs), hidden, inner, act)
    # clones: stacked weights of their own, so that a copied expert does not share memory with the dense model
    experts.gate_up_proj = nn.Parameter(_noisy(torch.stack(gate_ups), noise))
    experts.down_proj = nn.Parameter(_noisy(torch.stack(downs), noise))
    return experts


def _noisy(weight: Tensor, noise: float) -> Tensor:
    return weight if noise == 0 else weight + noise * weight.std() * torch.randn_like(weight)
