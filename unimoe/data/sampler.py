"""Batches of one modality set each; no sample is dropped."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import Sampler

from unimoe.errors import UserError

T = TypeVar("T")


class ModalityBatchSampler(Sampler[list[int]]):
    """Yields lists of indices, each of one modality set: Uni-MoE's modality-level data parallelism, without
    loss.

    1. The indices of each modality are shuffled.
    2. Each modality is split into global batches of ``batch_size * world_size``; the last, shorter one is
       kept. Remainders with fewer samples than ranks are merged across modalities.
    3. The global batches of all modalities are shuffled together.
    4. Rank r takes every world_size-th index of each global batch, starting at its r-th: at every step all
       ranks have the same modality and, within one, the same number of samples.

    Over all ranks an epoch holds every sample exactly once (unless there are fewer samples than ranks). The
    order is a function of (seed, epoch) alone. With ``steps`` the sampler instead runs through epochs 0, 1,
    ... and stops after exactly that many batches; ``set_epoch`` has no effect.

    With ``weights`` an epoch is as long as without, but each source's share of it is proportional to its
    weight: samples of an over-represented source wait for later epochs, those of an under-represented one
    repeat.

    ``len()`` is the number of batches in a whole epoch (or run), wherever the iteration starts.
    """

    def __init__(
        self,
        modalities: Sequence[str],
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        world_size: int = 1,
        rank: int = 0,
        steps: int | None = None,
        sizes: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        """
        Args:
            modalities: the modality set of each sample (``Sample.modality``).
            batch_size: samples of a batch on one rank.
            seed: seed of the order.
            shuffle: random order; otherwise that of the samples.
            world_size: number of ranks.
            rank: this one.
            steps: batches of the run; None for epochs.
            sizes: with ``weights``, the number of samples of each source, in the order of the samples.
            weights: relative weight of each source.

        Raises:
            UserError: a size, rank or weight is out of range.
        """
        if not modalities:
            raise UserError("there are no samples to draw batches from")
        if batch_size < 1 or (steps is not None and steps < 1):
            raise UserError(f"batch_size and steps must be at least 1, found {batch_size} and {steps}")
        if not 0 <= rank < world_size:
            raise UserError(f"rank must be from 0 to world_size - 1, found rank {rank} of {world_size}")
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.world_size, self.rank, self.steps = world_size, rank, steps
        self.epoch = 0
        self.yielded = 0
        """Batches of this epoch (or run) yielded so far, skipped ones included."""
        self._start = 0
        by_modality: dict[str, list[int]] = {}
        for index, modality in enumerate(modalities):
            by_modality.setdefault(modality, []).append(index)
        self._members = [np.asarray(indices) for indices in by_modality.values()]
        self._weights = None if weights is None else list(weights)
        self._strata = None if weights is None else _strata(self._members, sizes or [], weights)
        self.batches_per_epoch = len(self._batches(0))

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
        """Choose the order of the next iteration. A restored position applies to its own epoch only."""
        if self.steps is None and epoch != self.epoch:
            self.epoch, self._start = epoch, 0

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """The state from which ``load_state_dict`` resumes the identical remaining order.

        Args:
            consumed: batches of this epoch (or run) that were trained on. Required whenever batches are
                prefetched (DataLoader workers, Lightning); by default the number yielded.
        """
        return {
            "epoch": self.epoch,
            "consumed": self.yielded if consumed is None else consumed,
            "order": self._order(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Skip the batches already consumed.

        Raises:
            UserError: the data or the settings that determine the order have changed.
        """
        for name, value in self._order().items():
            if state["order"][name] != value:
                raise UserError(
                    f"cannot resume in the same order: {name} was {state['order'][name]}, now it is {value}; "
                    "restore it or start a new run"
                )
        self.epoch, self._start = state["epoch"], state["consumed"]
        self.yielded = self._start

    def _order(self) -> dict[str, Any]:
        """What determines the order of the global batches. The number of ranks may change as long as a step
        has as many samples in total."""
        size = self.batch_size * self.world_size
        left = [len(members) % size for members in self._members]
        return {
            "samples of each kind": [  # named so in the checkpoints of version 0.1
                len(members) for members in self._members
            ],
            "samples of a step": size,
            "samples too few for every rank": sum(few for few in left if few < self.world_size),
            "seed": self.seed,
            "shuffle": self.shuffle,
            **({} if self._weights is None else {"weights": self._weights}),
        }

    def _batches(self, epoch: int) -> list[list[int]]:
        generator = np.random.default_rng([self.seed, epoch])
        size = self.batch_size * self.world_size
        groups = []
        for modality, members in enumerate(self._members):
            if self._strata is not None:
                members = np.concatenate(
                    [stratum.draw(self.seed, epoch) for stratum in self._strata[modality]]
                )
            groups.append((generator.permutation(members) if self.shuffle else members).tolist())
        batches = split_batches(groups, size, self.world_size)
        if self.shuffle:
            batches = [batches[i] for i in generator.permutation(len(batches))]
        return [batch[self.rank :: self.world_size] for batch in batches]


def split_batches(groups: Iterable[list[T]], size: int, ranks: int) -> list[list[T]]:
    """Split every group into batches of ``size``, none with fewer samples than ``ranks``.

    A group's last batch may be shorter. Remainders with fewer samples than ranks are merged across groups,
    and the last one is added to the shortest batch. Only if it is the only batch are its samples repeated.
    """
    batches: list[list[T]] = []
    rest: list[T] = []
    for group in groups:
        parts = _split(group, size)
        if parts and len(parts[-1]) < ranks:
            rest += parts.pop()
        batches += parts
    batches += _split(rest, size)
    if batches and len(batches[-1]) < ranks:
        last = batches.pop()
        if batches:
            min(batches, key=len).extend(last)
        else:
            batches = [(last * ranks)[:ranks]]
    return batches


def _split(group: list[T], size: int) -> list[list[T]]:
    return [group[start : start + size] for start in range(0, len(group), size)]


@dataclass(frozen=True)
class _Stratum:
    """The samples of one modality and one source."""

    indices: np.ndarray
    number: int
    """Index of the source."""
    count: int
    """How many of them an epoch draws."""

    def draw(self, seed: int, epoch: int) -> np.ndarray:
        """The epoch's slice of an endless sequence of permutations of these samples."""
        size, first = len(self.indices), int(self.indices[0])
        places = np.arange(epoch * self.count, (epoch + 1) * self.count)
        turns = range(places[0] // size, places[-1] // size + 1)
        row = np.concatenate([shuffled((seed, self.number, first, turn), size) for turn in turns])
        return self.indices[row[places - turns[0] * size]]


@lru_cache(maxsize=64)
def shuffled(seed: tuple[int, ...], size: int) -> np.ndarray:
    """0 ... size-1 in random order, as a function of the seed alone."""
    return np.random.default_rng(seed).permutation(size)


def _strata(
    members: list[np.ndarray], sizes: Sequence[int], weights: Sequence[float]
) -> list[list[_Stratum]]:
    """The strata of each modality. An epoch draws about as many samples as there are, at least one per
    stratum."""
    total = sum(map(len, members))
    if len(sizes) != len(weights) or sum(sizes) != total or min(weights) <= 0:
        raise UserError(f"every source needs a weight above 0, found {list(weights)} for sizes {list(sizes)}")
    ends = np.cumsum(sizes)
    strata: list[list[_Stratum]] = []
    for indices in members:
        sources = np.searchsorted(ends, indices, side="right")
        strata.append([])
        for source in np.unique(sources).tolist():
            own = indices[sources == source]
            share = weights[source] / sum(weights) * len(own) / sizes[source]
            strata[-1].append(_Stratum(own, source, max(1, round(share * total))))
    return strata
