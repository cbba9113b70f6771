"""Experts of equal importance: the hidden units of an FFN, dealt out in the order of how active they are.

Shapes: H hidden, I intermediate, E experts of one FFN, S shared experts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unimoe.errors import UserError
from unimoe.moe.experts.swiglu import SwiGLUExperts
from unimoe.moe.parts import EXPERTS
from unimoe.moe.records import current_context

from .read import read_swiglu
from .slice import leading_slices, split_experts


@EXPERTS.register(
    "importance",
    source="SparseUnifiedModel, arXiv 2512.02351; partition: the authors' code",
    axis="FFN",
    exact="copies: 1, combine: one_plus, all experts chosen with logits of 0",
    healing="router, then experts: fewer than all experts are a part of the FFN",
)
def importance_experts(
    mlps: Sequence[nn.Module], slices: int, shared_experts: int = 0, noise: float = 0.0
) -> SwiGLUExperts:
    """Slices of each FFN that matter equally: its units, sorted by importance, are dealt out back and forth.

    Shared experts have the most important units, and no other expert has those. The importance of a unit is
    its mean absolute activation where it was measured (``importance`` of a manifest,
    :func:`measure_importance`), else the product of the norms of its gate and up weights.

    Args:
        mlps: the dense FFNs.
        slices: experts of each.
        noise: Gaussian noise on each expert's weights, in standard deviations of each weight matrix.

    Raises:
        UserError: an FFN is not a bias-free gated FFN, or cannot be cut in ``slices`` and shared experts.
    """
    routed = {mlp: _Ordered(mlp, slices, shared_experts).routed for mlp in dict.fromkeys(mlps)}
    return split_experts([routed[mlp] for mlp in mlps], slices, noise)


def important_units(mlp: nn.Module, slices: int, shared_experts: int) -> SwiGLUExperts:
    """The shared experts that belong to :func:`importance_experts`."""
    ordered = _Ordered(mlp, slices, shared_experts)
    return leading_slices(ordered.shared, shared_experts, ordered.width)


def deal_units(importance_I: Tensor, experts: int, shared: int) -> list[Tensor]:
    """Indices of the units of the shared experts, all of them in one tensor, and of each other expert.

    Raises:
        UserError: the units do not divide among all experts.
    """
    units = len(importance_I)
    if units % (experts + shared):
        raise UserError(
            f"cannot deal {units} units to {experts} slices and {shared} shared experts, expected a divisor"
        )
    order_I = torch.argsort(importance_I, descending=True, stable=True)
    first = shared * units // (experts + shared)
    rows = order_I[first:].unflatten(0, (-1, experts)).clone()
    rows[1::2] = rows[1::2].flip(1)
    return [order_I[:first], *rows.T]


def measure_importance(mlps: Sequence[nn.Module], run: Callable[[], None]) -> None:
    """Note the mean absolute activation of each unit over the tokens that ``run`` sends through the FFNs."""
    sums: dict[nn.Module, list[Any]] = {mlp: [0.0, 0] for mlp in mlps}
    hooks = []
    for mlp in mlps:

        def see(_: nn.Module, inputs: tuple[Tensor, ...], mlp: nn.Module = mlp) -> None:
            activation_TI, pad_T = inputs[0].flatten(0, -2), current_context().pad_T
            kept = activation_TI if pad_T is None else activation_TI[~pad_T.reshape(-1)]
            sums[mlp][0] += kept.abs().double().sum(0).cpu()
            sums[mlp][1] += len(kept)

        hooks.append(mlp.down_proj.register_forward_pre_hook(see))  # type: ignore[union-attr, operator]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    for mlp, (total_I, tokens) in sums.items():
        if not tokens:
            raise UserError("no token went through the FFNs whose units' importance is measured")
        mlp.unit_importance = total_I / tokens


class _Ordered:
    """One FFN as two: the units of the shared experts, and the others, expert by expert."""

    def __init__(self, mlp: nn.Module, experts: int, shared: int):
        gate_up, down = read_swiglu(mlp)
        gate, up = gate_up.chunk(2)
        measured = getattr(mlp, "unit_importance", None)
        importance_I = gate.norm(dim=1) * up.norm(dim=1) if measured is None else measured.to(gate.device)
        parts = deal_units(importance_I, experts, shared)
        self.width, act_fn = down.shape[1] // (experts + shared), getattr(mlp, "act_fn", None)
        self.shared, self.routed = (
            _ffn(gate[units], up[units], down[:, units], act_fn) for units in (parts[0], torch.cat(parts[1:]))
        )


def _ffn(gate: Tensor, up: Tensor, down: Tensor, act_fn: Any) -> nn.Module:
    ffn = nn.Module()
    ffn.act_fn = act_fn
    for name, weight in {"gate_proj": gate, "up_proj": up, "down_proj": down}.items():
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.weight = nn.Parameter(weight)
        setattr(ffn, name, linear)
    return ffn
