"""What the processes of one run tell each other; a process alone keeps what it has."""

from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributed import all_gather_object, all_reduce, get_world_size, is_available, is_initialized


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


def union_over_ranks(found: dict[Any, Any]) -> dict[Any, Any]:
    """The entries of every rank's dictionary, on all ranks."""
    if not (is_available() and is_initialized()):
        return found
    parts: list[Any] = [None] * get_world_size()
    all_gather_object(parts, found)
    return {key: value for part in parts for key, value in part.items()}
