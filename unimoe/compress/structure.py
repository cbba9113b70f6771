"""A plan carried out on a model, with weights or on the meta device.

On the meta device it allocates weights that are read afterwards (:mod:`unimoe.model.structure`); on a
model with weights, experts are sliced, and those that are merged become weighted means.

Shapes: E experts before, X after, D hidden.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from unimoe.errors import UserError
from unimoe.moe.layer import MoELayer
from unimoe.moe.routing import Pairs, Routing
from unimoe.moe.upcycle.rows import expert_rows, set_expert_rows
from unimoe.moe.view import MoEView, view

from . import bit_router, compressed_experts
from .pack import pack_model
from .plan import Plan
from .route import rewrite
from .skip_rules import install, rule_of

COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")
"""Names under which modules of transformers keep the number of experts, one in each."""
Weights = Sequence[Tensor]
"""Weights [E] of each MoE layer: how much of each expert goes into the merged one."""


def check_coverage(model: nn.Module, layers: Sequence[MoEView]) -> int:
    """The weights of all routed experts without biases, every one of which the layers hold.

    Raises:
        UserError: some experts were not found; a plan would pass them by silently.
    """
    inside = {id(one) for layer in layers for one in layer.experts.parameters()}
    missed = [
        name
        for name, one in model.named_parameters()
        if "experts" in name.split(".") and id(one) not in inside and not _is_shared(name, layers)
    ]
    total = sum(one.numel() for layer in layers for one in layer.experts.parameters() if one.dim() == 3)
    if missed:
        raise UserError(
            f"{len(missed)} weights of experts were not found, such as {missed[0]}: this kind of mixture is "
            "not supported"
        )
    return total


def _is_shared(name: str, layers: Sequence[MoEView]) -> bool:
    return any(layer.ours and name.startswith(f"{layer.name}.shared.") for layer in layers)


@torch.no_grad()
def structure(model: nn.Module, plan: Plan, weights: Weights | None = None) -> None:
    """Give a model the experts that a plan says, in place.

    Args:
        model: with weights, or on the meta device.
        plan: what to keep, merge and pack.
        weights: of the experts that are merged; None takes plain means.

    Raises:
        UserError: the plan does not fit.
    """
    layers = view(model)
    plan.check(layers)
    if plan.keep is not None:
        for layer, kept in zip(layers, plan.keep, strict=True):
            keep_experts(layer, kept)
        layers = view(model)
    if plan.merge is not None:
        for place, (layer, merged) in enumerate(zip(layers, plan.merge, strict=True)):
            merge_experts(layer, merged, None if weights is None else weights[place])
    if plan.main is not None:
        compressed_experts.attach(view(model), plan.main)
    if plan.skip is not None:
        install(view(model), rule_of(plan.skip))
    if plan.bits is not None or plan.linears is not None or plan.head is not None:
        layers = view(model)
        pack_model(model, layers, plan)
        for layer in layers:
            move_hooks(layer.experts, layer.block.experts)  # type: ignore[arg-type]
    if plan.nested is not None:
        layers = view(model)
        bit_router.attach(layers, plan.nested)
        for layer in layers:
            move_hooks(layer.experts, layer.block.experts)  # type: ignore[arg-type]


def keep_experts(layer: MoEView, kept: Sequence[int]) -> None:
    """Slice the experts of one layer and their rows of the router; a token visits at most as many as are
    left."""
    if list(kept) == list(range(layer.num_experts)):
        return
    index_X = torch.tensor(kept)
    if isinstance(layer.block, MoELayer):
        rows = expert_rows(layer.block)
        set_expert_rows(layer.block, {name: _take(one, index_X) for name, one in rows.items()})
        router: Any = layer.router
        if hasattr(router, "k"):
            router.k = min(router.k, router.num_experts)
        return
    for module in (*layer.router.modules(), layer.experts, layer.block):
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.shape[:1] == (layer.num_experts,):
                _put(module, name, _take(tensor, index_X))
            elif tensor.shape == (1, layer.num_experts):
                _put(module, name, _take(tensor[0], index_X)[None])
            elif module is not layer.experts and layer.num_experts in tensor.shape:
                raise UserError(
                    f"{layer.name}: {name} of {type(module).__name__} has shape {list(tensor.shape)}; its "
                    f"{layer.num_experts} may be one for each expert, which cannot be pruned"
                )
    for module in (*layer.router.modules(), layer.experts, layer.block):
        _set_counts(module, layer.num_experts, len(kept))
        if getattr(module, "top_k", 0) > len(kept):
            module.top_k = len(kept)  # type: ignore[assignment]
    if isinstance(layer.router, nn.Linear):
        layer.router.out_features = len(kept)


def merge_experts(layer: MoEView, merged: Sequence[int], weight_E: Tensor | None = None) -> None:
    """Put the weighted mean of some experts in their place; the router keeps all its rows, and a token that
    chooses two experts of one merged expert gets the sum of both weights (Sub-MoE, arXiv 2506.23266: its
    union SVD gives this mean)."""
    count = max(merged) + 1
    if count == layer.num_experts:
        return
    experts: Any = layer.experts
    for name, stack in layer.stacks().items():
        _put(experts, name, merge_rows(stack, merged, weight_E))
    old = layer.num_experts
    experts.merge_map = list(merged)
    _set_counts(experts, old, count)
    if isinstance(layer.block, MoELayer):
        layer.block.num_experts = count
        layer.router.register_forward_hook(partial(_map_routing, list(merged)))
    else:
        rewrite(layer, partial(_map_slots, {}, list(merged)))


def merge_rows(stack: Tensor, merged: Sequence[int], weight_E: Tensor | None = None) -> Tensor:
    """[E, ...] -> [X, ...]: sum_i f_i W_i / sum_i f_i of each cluster, in float32 (Sub-MoE, eq. 5 to 8, where
    U S (sum f_i V_i / sum f_i)^T of the union SVD is the same)."""
    count = max(merged) + 1
    if stack.is_meta:
        return stack.new_empty(count, *stack.shape[1:])
    map_E = torch.tensor(merged, device=stack.device)
    weight_E = torch.ones(len(map_E)) if weight_E is None else weight_E
    weight_E = weight_E.to(stack.device, torch.float32)
    total_X = weight_E.new_zeros(count).index_add(0, map_E, weight_E)
    even_E = (total_X == 0)[map_E]  # a cluster that no token visited: a plain mean
    weight_E = torch.where(even_E, 1.0, weight_E)
    total_X = weight_E.new_zeros(count).index_add(0, map_E, weight_E)
    share_E = (weight_E / total_X[map_E]).reshape(-1, *[1] * (stack.dim() - 1))
    zeros = stack.new_zeros(count, *stack.shape[1:], dtype=torch.float32)
    return zeros.index_add(0, map_E, stack.float() * share_E).to(stack.dtype)


def _map_slots(
    maps: dict[torch.device, Tensor],
    merged: list[int],
    layer: MoEView,
    x: Tensor,
    index: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor]:
    if index.device not in maps:
        maps[index.device] = torch.tensor([*merged, max(merged) + 1], device=index.device)
    return maps[index.device][index], weight


def _map_routing(merged: list[int], router: nn.Module, args: Any, routing: Routing) -> Routing:
    """The routing over merged experts, with null experts behind them; the probability of a merged one is the
    sum of its members'."""
    null, count = routing.num_experts - len(merged), max(merged) + 1
    map_E = torch.tensor([*merged, *range(count, count + null)], device=routing.expert_N.device)
    expert_N, order_N = torch.sort(map_E[routing.expert_N], stable=True)
    offsets = torch.searchsorted(expert_N, torch.arange(count + null + 1, device=expert_N.device))
    pairs = Pairs(routing.token_N[order_N], expert_N, routing.weight_N[order_N], offsets)

    def probs_TX() -> Tensor:
        zeros_TX = routing.probs_TE.new_zeros(routing.num_tokens, count + null)
        return zeros_TX.index_add(1, map_E, routing.probs_TE)

    return Routing.from_pairs(pairs, routing.logits_TE, probs_TX, routing.extra)


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """What rewrites or records the routing in front of experts stays when they are replaced."""
    if old is new:
        return
    new._forward_pre_hooks.update(old._forward_pre_hooks)
    new._forward_hooks.update(old._forward_hooks)
    for name in ("merge_map", "leaves_records"):
        if name in vars(old):
            setattr(new, name, vars(old)[name])


def _take(tensor: Tensor, index_X: Tensor) -> Tensor:
    return tensor.detach()[index_X.to(tensor.device)].clone()


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or a buffer."""
    old = getattr(module, name)
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(tensor, old.requires_grad and tensor.is_floating_point()))
    else:
        module._buffers[name] = tensor


def _set_counts(module: nn.Module, old: int, new: int) -> None:
    for name in COUNTS:
        if getattr(module, name, None) == old:
            setattr(module, name, new)
