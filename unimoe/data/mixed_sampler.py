"""Batches with a fixed number of samples from each of several files."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import Sampler

from unimoe.errors import UserError

from .sampler import shuffled


class MixedBatchSampler(Sampler[list[int]]):
    """Yields ``steps`` lists of indices, each with ``counts[i]`` samples of source i.

    A source's samples are reshuffled each time all of them were used, as a function of the seed alone; batch
    b takes the b-th slice of that endless sequence, so any batch can be computed on its own. Each rank takes
    slices of its own.
    """

    def __init__(
        self,
        sizes: list[int],
        counts: list[int],
        steps: int,
        seed: int = 0,
        world_size: int = 1,
        rank: int = 0,
    ):
        """Source i holds ``sizes[i]`` samples, with the indices that follow those of source i - 1.

        Raises:
            UserError: a source or its share of a batch is empty.
        """
        if len(sizes) != len(counts) or min(counts) < 1 or min(sizes) < 1:
            raise UserError(
                f"a mix needs at least one sample of each file in a batch, found {counts} of {sizes}"
            )
        self.sizes, self.counts, self.steps = sizes, counts, steps
        self.seed, self.world_size, self.rank = seed, world_size, rank
        self._start = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self._start, self.steps):
            yield self.batch(step)

    def batch(self, step: int) -> list[int]:
        """The indices of one batch."""
        indices: list[int] = []
        offset = 0
        for source, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            first = (step * self.world_size + self.rank) * count
            for place in range(first, first + count):
                turn, position = divmod(place, size)
                indices.append(offset + int(shuffled((self.seed, source, turn), size)[position]))
            offset += size
        return indices

    def state_dict(self, consumed: int) -> dict[str, Any]:
        """The state from which ``load_state_dict`` resumes after ``consumed`` batches."""
        return {"consumed": consumed, "order": self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Skip the batches already consumed.

        Raises:
            UserError: a setting that determines the order has changed.
        """
        for name, value in self._settings().items():
            if state["order"][name] != value:
                raise UserError(
                    f"cannot resume in the same order: {name} was {state['order'][name]}, now it is {value}"
                )
        self._start = state["consumed"]

    def _settings(self) -> dict[str, Any]:
        return {
            "samples of each file": self.sizes,
            "mix": [count * self.world_size for count in self.counts],
            "seed": self.seed,
        }
