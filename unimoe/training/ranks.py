"""Collectives over the processes of a run; without torch.distributed each returns its input."""

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributed import (
    ReduceOp,
    all_gather_object,
    all_reduce,
    get_rank,
    get_world_size,
    is_available,
    is_initialized,
)

from unimoe.moe import ExpertLoad

T = TypeVar("T")


def process_rank() -> int:
    """The rank of this process, also before there is a trainer."""
    return cast(Any, rank_zero_only).rank or 0  # an attribute that Lightning gives its function


def data_parallel_size(trainer: Trainer) -> int:
    """Number of groups of processes that receive different batches."""
    return trainer.world_size // _ranks_per_batch(trainer)


def data_parallel_rank(trainer: Trainer) -> int:
    """The group that this process belongs to, of :func:`data_parallel_size`."""
    return trainer.global_rank // _ranks_per_batch(trainer)


def even_share(count: int, trainer: Trainer) -> list[int]:
    """Places 0..count-1 that this rank evaluates: as many as any other rank, so that all take the same steps;
    a few places come twice."""
    ranks = data_parallel_size(trainer)
    return [place % count for place in range(data_parallel_rank(trainer), count + -count % ranks, ranks)]


def _ranks_per_batch(trainer: Trainer) -> int:
    return getattr(trainer.strategy, "ranks_per_batch", 1)


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of a tensor over all ranks; its shape must be the same on each."""
    if not (is_available() and is_initialized()):
        return values
    total = values.detach().clone()
    all_reduce(total)
    return total / get_world_size()


def max_over_ranks(count: int, device: torch.device) -> int:
    """The largest of all ranks' counts; ``device`` is that of the communication."""
    if not (is_available() and is_initialized()):
        return count
    largest = torch.tensor(count, device=device)
    all_reduce(largest, ReduceOp.MAX)
    return int(largest)


def range_over_ranks(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest ``low`` and the largest ``high`` of all ranks, element by element; every rank must call
    it."""
    if not (is_available() and is_initialized()):
        return low, high
    low, high = low.detach().clone(), high.detach().clone()
    all_reduce(low, ReduceOp.MIN)
    all_reduce(high, ReduceOp.MAX)
    return low, high


def across_ranks(values: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, whose gradient is that of this rank's share: see
    :data:`unimoe.moe.losses.auxiliary.Across`."""
    if not (is_available() and is_initialized()):
        return values
    return values - values.detach() + mean_over_ranks(values)


class _Sum(torch.autograd.Function):
    """The sum over ranks; its gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        all_reduce(total)
        return total


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, differentiable on each: for statistics of a batch that every rank's
    loss depends on. Every rank must call it, and its backward pass."""
    if not (is_available() and is_initialized()):
        return values
    return cast(Tensor, _Sum.apply(values))


def expert_load_over_ranks(loads: Sequence[ExpertLoad]) -> list[ExpertLoad]:
    """The mean load of each of a rank's layers, which may have different numbers of experts; every rank must
    call it."""
    if not loads:
        return []
    counts = [torch.cat([load.tokens_per_expert, torch.as_tensor(load.tokens)[None]]) for load in loads]
    mean = mean_over_ranks(torch.cat(counts)).split([len(count_X) for count_X in counts])
    return [ExpertLoad(mean_X[:-1], mean_X[-1]) for mean_X in mean]


def rank_weighted(mean: Tensor, count: int) -> Tensor:
    """Weight a rank's mean over ``count`` items so that the mean over ranks is the mean over all items.

    Every rank must call it.
    """
    return mean * (count / mean_over_ranks(mean.new_tensor(float(count))).clamp(min=1e-9))


def shard_across_ranks(items: Sequence[T]) -> Sequence[T]:
    """This rank's share of ``items`` (every world-size-th one)."""
    return items[get_rank() :: get_world_size()] if is_available() and is_initialized() else items


def union_over_ranks(found: dict[Any, Any]) -> dict[Any, Any]:
    """The union of all ranks' dictionaries, on every rank."""
    if not (is_available() and is_initialized()):
        return found
    parts: list[Any] = [None] * get_world_size()
    all_gather_object(parts, found)
    return {key: value for part in parts for key, value in part.items()}
