"""Expert parallelism: each process holds a shard of the experts of every MoE layer.

Shapes: T tokens, N (token, expert) pairs sorted by expert, M pairs that came here, D hidden, E experts, P
processes, F = E / P experts of each.
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from unimoe.errors import UserError
from unimoe.moe.experts.base import Experts

from .dispatcher import Dispatcher
from .layer import MoELayer
from .routing import Pairs, Routing

Exchange = Literal["all_to_all", "all_reduce"]


class _GroupDispatcher(Dispatcher):
    """Experts hold their shard as DTensors, divided among the processes of ``group``."""

    def __init__(self, group: ProcessGroup):
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)


class AllReduceDispatcher(_GroupDispatcher):
    """The processes of the group see the same tokens. Each runs those of its own experts, and the outputs are
    summed.

    Tokens and weights enter by :class:`_SumGradients` and outputs leave by :class:`_SumOutputs`: with torch's
    differentiable all-reduce in their place, expert gradients would be P times too large.
    """

    def __call__(self, experts: Experts, x_TD: Tensor, routing: Routing, weight_N: Tensor) -> Tensor:
        own = routing.num_experts // self.size
        offsets_F1 = routing.offsets_E1[self.rank * own : (self.rank + 1) * own + 1]
        pairs = slice(int(offsets_F1[0]), int(offsets_F1[-1]))
        mine = Pairs(
            routing.token_N[pairs],
            routing.expert_N[pairs] - self.rank * own,
            routing.weight_N[pairs],
            offsets_F1 - offsets_F1[0],
        )
        local = Routing.from_pairs(mine, routing.logits_TE, routing.probs_TE)
        x_TD, weight_N = _SumGradients.apply(self.group, x_TD, weight_N)
        return _SumOutputs.apply(self.group, experts(x_TD, local, weight_N[pairs]))


class AllToAllDispatcher(_GroupDispatcher):
    """Each process sees tokens of its own. A token's rows travel to the processes of its experts, and their
    outputs travel back."""

    def __call__(self, experts: Experts, x_TD: Tensor, routing: Routing, weight_N: Tensor) -> Tensor:
        # (1) how many rows of each expert go where
        sent_E = routing.offsets_E1.diff()
        came_E = torch.empty_like(sent_E)
        dist.all_to_all_single(came_E, sent_E, group=self.group)
        came_PF = came_E.reshape(self.size, -1)
        sent_P, came_P = sent_E.reshape(self.size, -1).sum(1).tolist(), came_PF.sum(1).tolist()
        # (2) pairs are sorted by expert, so each process's lie together
        x_ND = x_TD.index_select(0, routing.token_N)
        x_MD = all_to_all_single_autograd(x_ND, came_P, sent_P, self.group)
        # an expert's gradient is the mean over the processes whose tokens it saw, as of all other weights
        x_MD = _ScaleGradient.apply(x_MD, float(self.size))
        # (3) what came is sorted by sender, then by expert; each row visits one expert
        y_MD = experts(x_MD, _visits(x_MD, came_PF), x_MD.new_ones(len(x_MD)))
        # (4) home again, in the order in which they left
        y_MD = _ScaleGradient.apply(y_MD, 1 / self.size)
        y_ND = all_to_all_single_autograd(y_MD, sent_P, came_P, self.group)
        zeros_TD = torch.zeros_like(x_TD, dtype=y_ND.dtype)
        return zeros_TD.index_add(0, routing.token_N, y_ND * weight_N[:, None].to(y_ND.dtype))


def _visits(x_MD: Tensor, came_PF: Tensor) -> Routing:
    """The routing of rows that lie by sender, then by expert."""
    experts = came_PF.shape[1]
    expert_M = torch.arange(experts, device=x_MD.device).repeat(len(came_PF))
    expert_M, order_M = expert_M.repeat_interleave(came_PF.flatten()).sort(stable=True)
    offsets_F1 = torch.cat([came_PF.new_zeros(1), came_PF.sum(0).cumsum(0)])
    unknown_MF = x_MD.new_zeros(len(x_MD), experts)
    pairs = Pairs(order_M, expert_M, x_MD.new_ones(len(x_MD)), offsets_F1)
    return Routing.from_pairs(pairs, unknown_MF, unknown_MF)


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is scaled."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient * ctx.factor, None


class _SumGradients(torch.autograd.Function):
    """Identity whose gradients are summed over the group."""

    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        summed = [gradient.contiguous().clone() for gradient in gradients]
        for gradient in summed:
            dist.all_reduce(gradient, group=ctx.group)
        return None, *summed


class _SumOutputs(torch.autograd.Function):
    """Sum over the group whose gradient is passed through."""

    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, tensor: Tensor) -> Tensor:
        total = tensor.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, gradient


def divide_experts(layer: MoELayer, mesh: DeviceMesh, exchange: Exchange) -> None:
    """Keep this process's shard of an MoE layer's experts, in place.

    Raises:
        UserError: the experts cannot be divided evenly, or share parameters.
    """
    experts = layer.experts
    if experts.indivisible:
        raise UserError(f"{type(experts).__name__} {experts.indivisible}; leave expert_parallel at 1")
    if experts.num_experts % mesh.size():
        raise UserError(
            f"{experts.num_experts} experts cannot be divided among {mesh.size()} processes; set "
            "expert_parallel to a divisor"
        )
    for module in experts.modules():
        for name, stack in list(module.named_parameters(recurse=False)):
            if stack.shape[0] != experts.num_experts:
                raise UserError(f"experts that share {name} cannot be divided; leave expert_parallel at 1")
            shared = distribute_tensor(stack.detach(), mesh, [Shard(0)], src_data_rank=None)
            setattr(module, name, nn.Parameter(shared, requires_grad=stack.requires_grad))
    dispatcher = AllToAllDispatcher if exchange == "all_to_all" else AllReduceDispatcher
    layer.dispatcher = dispatcher(mesh.get_group())
