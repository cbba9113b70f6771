"""Compressed experts: of a token's K experts only the best few run; of the others three vectors each remain.

arXiv 2503.00634 and its released code. The vectors of the experts that do not run, weighted as the router
weights them among themselves, scale the inputs of the three matrices of those that do. They start as ones and
are trained (:mod:`unimoe.compress.tune`).

Shapes: T tokens, K slots of a token, A auxiliary slots, E experts, D hidden, I inner width of an expert,
V = 2 D + I.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from unimoe.errors import UserError
from unimoe.moe.layer import MoELayer
from unimoe.moe.routing import Routing
from unimoe.moe.slots import slots
from unimoe.moe.view import MoEView

from .watch import activation


def attach(layers: Sequence[MoEView], main: int) -> None:
    """Give each layer its vectors, a parameter ``theta`` [E, V] of the block, and let ``main`` experts of a
    token run.

    Raises:
        UserError: there are not more experts than that for a token, or they are not plain gated experts.
    """
    for layer in layers:
        if not 1 <= main < layer.top_k:
            raise UserError(
                f"experts is {main}, expected 1 to {layer.top_k - 1}: a token visits {layer.top_k}"
            )
        combine = getattr(layer.block, "combine", "weight")
        plain = set(layer.stacks()) == {"gate_up_proj", "down_proj"} and activation(layer) is not None
        if not plain or combine != "weight":
            raise UserError(f"{layer.name}: compressed experts need gated experts without biases")
    for layer in layers:
        down_DI = layer.expert(0)["down"]
        stack = layer.stacks()["down_proj"]
        theta = torch.ones(len(stack), 2 * down_DI.shape[0] + down_DI.shape[1], device=stack.device)
        layer.block.register_parameter("theta", nn.Parameter(theta))
        experts: Any = layer.experts
        experts.forward = partial(_forward, layer, main)  # few_rows.py sees it, and steps aside


@contextmanager
def detached(layers: Sequence[MoEView]) -> Iterator[None]:
    """Inside, all experts of a token run, as before :func:`attach`: the teacher of the vectors."""
    forwards = [vars(layer.experts).pop("forward") for layer in layers]
    try:
        yield
    finally:
        for layer, forward in zip(layers, forwards, strict=True):
            experts: Any = layer.experts
            experts.forward = forward


def _forward(layer: MoEView, main: int, x_TD: Tensor, *routed: Any) -> Tensor:
    """Stand in for the experts' forward: ours takes (routing, weights), transformers' (indices, weights)."""
    if isinstance(layer.block, MoELayer):
        routing: Routing = routed[0]
        index_TK, weight_TK = slots(routing)
    else:
        index_TK, weight_TK = routed[:2]
    return weighted_sum(layer, x_TD, index_TK, weight_TK, main)


def weighted_sum(layer: MoEView, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, main: int) -> Tensor:
    """[T, D] sum over the main experts of g W_down ((act(W_gate (x e1)) * W_up (x e2)) e3).

    The weights g are those of the full choice: they are not divided by the sum of the main ones. A token
    without auxiliary experts has e = 1.
    """
    weight_TK, order_TK = weight_TK.sort(dim=1, descending=True, stable=True)
    index_TK = index_TK.gather(1, order_TK)
    theta_EV: Any = layer.block.theta
    scale_TV = auxiliary_scale(theta_EV, index_TK[:, main:], weight_TK[:, main:])
    width = x_TD.shape[1]
    e1_TD, e2_TD, e3_TI = scale_TV.to(x_TD.dtype).tensor_split([width, 2 * width], dim=1)
    gate_TD, up_TD = x_TD * e1_TD, x_TD * e2_TD
    act = activation(layer)
    assert act is not None, "attach has asked"
    y_TD = torch.zeros_like(x_TD)
    for expert in index_TK[:, :main].unique().tolist():
        if expert >= layer.num_experts:
            continue
        token_X, slot_X = (index_TK[:, :main] == expert).nonzero(as_tuple=True)
        matrices = layer.expert(expert)
        both = gate_TD[token_X] @ matrices["gate"].T, up_TD[token_X] @ matrices["up"].T
        y_XD = (act(torch.cat(both, dim=1)) * e3_TI[token_X]) @ matrices["down"].T
        y_TD = y_TD.index_add(0, token_X, y_XD * weight_TK[token_X, slot_X, None].to(y_XD.dtype))
    return y_TD


def auxiliary_scale(theta_EV: Tensor, index_TA: Tensor, weight_TA: Tensor) -> Tensor:
    """[T, V] sum_j a_j theta_j over the auxiliary experts, a their weights divided by their sum."""
    real_TA = index_TA < len(theta_EV)
    weight_TA = (weight_TA * real_TA).to(theta_EV.dtype)
    total_T1 = weight_TA.sum(dim=1, keepdim=True)
    share_TA = weight_TA / torch.where(total_T1 > 0, total_T1, 1)
    scale_TV = torch.einsum("ta,tav->tv", share_TA, theta_EV[index_TA.where(real_TA, 0)])
    return torch.where(total_T1 > 0, scale_TV, 1)
