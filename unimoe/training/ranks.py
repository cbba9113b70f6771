"""What the processes of one run tell each other; a process alone keeps what it has."""

from collections.abc import Sequence
from typing import Any, TypeVar

from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributed import (
    all_gather_object,
    all_reduce,
    get_rank,
    get_world_size,
    is_available,
    is_initialized,
)

T = TypeVar("T")


def data_ranks(trainer: Trainer) -> tuple[int, int]:
    """How many processes take batches of their own, and which of them this one is."""
    sharing = getattr(trainer.strategy, "ranks_per_batch", 1)
    return trainer.world_size // sharing, trainer.global_rank // sharing


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of every rank's tensor (one shape on all)."""
    if not (is_available() and is_initialized()):
        return values
    total = values.detach().clone()
    all_reduce(total)
    return total / get_world_size()


def weighed(mean: Tensor, count: int) -> Tensor:
    """A rank's mean over ``count`` things, weighted so that the mean over the ranks is that over all things;
    every rank calls it."""
    return mean * (count / mean_over_ranks(mean.new_tensor(float(count))).clamp(min=1e-9))


def own_share(items: Sequence[T]) -> Sequence[T]:
    """The items that fall to this rank where all ranks share them out."""
    return items[get_rank() :: get_world_size()] if is_available() and is_initialized() else items


def union_over_ranks(found: dict[Any, Any]) -> dict[Any, Any]:
    """The entries of every rank's dictionary, on all ranks."""
    if not (is_available() and is_initialized()):
        return found
    parts: list[Any] = [None] * get_world_size()
    all_gather_object(parts, found)
    return {key: value for part in parts for key, value in part.items()}
