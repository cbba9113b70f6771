"""Batches of like with like: every batch holds samples of one modality set, and no sample is dropped."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from unimoe.errors import UserError

_BUCKET_BATCHES = 32
"""How many batches are sorted by length among themselves: more means less padding and less shuffling."""


class ModalityBatchSampler(Sampler[list[int]]):
    """Yields lists of indices, each of one kind: Uni-MoE's modality-level data parallelism, losing nothing.

    1. The indices of each kind are shuffled; with ``lengths`` also sorted by length in buckets of 32 batches.
    2. Each kind is cut in global batches of ``batch_size * world_size``; the last, shorter one is kept.
    3. The global batches of all kinds are shuffled together.
    4. Rank r takes every world_size-th index of each global batch, from its r-th on, so at every step all
       ranks have the same kind and the same number of samples. A short global batch that does not divide by
       the ranks is filled up with samples from the beginning of its kind, fewer than ``world_size`` of them.

    Over all ranks an epoch holds every sample exactly once, except those repeated in 4. The order is a
    function of (seed, epoch) alone. With ``steps`` the sampler is instead one endless run of epochs 0, 1, ...
    cut after exactly that many batches, and ``set_epoch`` has no effect.

    ``len()`` is the number of batches in a whole epoch (or run), wherever the iteration starts.
    """

    def __init__(
        self,
        kinds: Sequence[str],
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        world_size: int = 1,
        rank: int = 0,
        lengths: Sequence[int] | None = None,
        steps: int | None = None,
    ) -> None:
        """``kinds[i]`` names the modality set of sample i (``Sample.kind``), ``lengths[i]`` its length in any
        unit; ``batch_size`` is that of one rank. Raises UserError for sizes that make no sense."""
        if not kinds:
            raise UserError("there are no samples to draw batches from")
        if batch_size < 1 or (steps is not None and steps < 1):
            raise UserError(f"batch_size and steps must be at least 1, found {batch_size} and {steps}")
        if not 0 <= rank < world_size:
            raise UserError(f"rank must be from 0 to world_size - 1, found rank {rank} of {world_size}")
        if lengths is not None and len(lengths) != len(kinds):
            raise UserError(f"found {len(lengths)} lengths for {len(kinds)} samples")
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.world_size, self.rank, self.steps = world_size, rank, steps
        self.epoch = 0
        self.yielded = 0
        """Batches of this epoch (or run) handed out so far, the skipped ones included."""
        self._start = 0
        self._lengths = None if lengths is None else np.asarray(lengths)
        by_kind: dict[str, list[int]] = {}
        for index, kind in enumerate(kinds):
            by_kind.setdefault(kind, []).append(index)
        self._members = [np.asarray(indices) for indices in by_kind.values()]
        global_batch = batch_size * world_size
        self.batches_per_epoch = sum(-(-len(members) // global_batch) for members in self._members)

    def __len__(self) -> int:
        return self.batches_per_epoch if self.steps is None else self.steps

    def __iter__(self) -> Iterator[list[int]]:
        """Start at the beginning of the epoch, or where ``load_state_dict`` put this epoch (or run)."""
        self.yielded = self._start
        epoch, batches = -1, []
        while self.yielded < len(self):
            turn, position = divmod(self.yielded, self.batches_per_epoch)
            if self.steps is None:
                turn, position = self.epoch, self.yielded
            if turn != epoch:
                epoch, batches = turn, self._batches(turn)
            self.yielded += 1
            yield batches[position]

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration. A loaded position holds for its own epoch only."""
        if self.steps is None and epoch != self.epoch:
            self.epoch, self._start = epoch, 0

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """What ``load_state_dict`` needs to go on with the identical remaining order.

        ``consumed`` is the number of batches of this epoch (or run) that were trained on. Give it whenever
        batches are fetched ahead (DataLoader workers, Lightning); by default it is what was handed out.
        """
        return {
            "epoch": self.epoch,
            "consumed": self.yielded if consumed is None else consumed,
            "order": self._order(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Skip the batches already consumed. UserError when the data or settings behind the order changed."""
        for name, value in self._order().items():
            if state["order"][name] != value:
                raise UserError(
                    f"cannot resume in the same order: {name} was {state['order'][name]}, now it is {value}; "
                    "set it back or start the run anew"
                )
        self.epoch, self._start = state["epoch"], state["consumed"]
        self.yielded = self._start

    def _order(self) -> dict[str, Any]:
        return {
            "samples of each kind": [len(members) for members in self._members],
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "sorting by length": self._lengths is not None,
        }

    def _batches(self, epoch: int) -> list[list[int]]:
        generator = np.random.default_rng([self.seed, epoch])
        size = self.batch_size * self.world_size
        batches: list[list[int]] = []
        for members in self._members:
            order = generator.permutation(members) if self.shuffle else members
            if self._lengths is not None:
                order = self._sort_in_buckets(order, self._lengths, size * _BUCKET_BATCHES)
            for start in range(0, len(order), size):
                batch = order[start : start + size]
                filled = np.concatenate([batch, np.resize(order, -len(batch) % self.world_size)])
                batches.append(filled[self.rank :: self.world_size].tolist())
        if self.shuffle:
            return [batches[i] for i in generator.permutation(len(batches))]
        return batches

    @staticmethod
    def _sort_in_buckets(order: np.ndarray, lengths: np.ndarray, size: int) -> np.ndarray:
        buckets = [order[start : start + size] for start in range(0, len(order), size)]
        return np.concatenate([bucket[np.argsort(lengths[bucket], kind="stable")] for bucket in buckets])
