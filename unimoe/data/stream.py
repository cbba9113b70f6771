"""Batches of one modality set each, streamed from files that are never held in memory as a whole.

files in random order -> a buffer from which samples are drawn -> one queue per modality -> global batches
"""

from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from unimoe.errors import UserError

from .read import data_files, stream_samples
from .sample import Sample
from .sampler import split_batches


class SampleStream(IterableDataset):
    """Yields ``steps`` lists of Samples, each of one modality set: ModalityBatchSampler over a shuffle
    buffer.

    Every rank and every loader worker reads the same samples in the same order and keeps its own share of
    each global batch, so at every step all ranks have the same modality; each decodes only its own media. An
    epoch holds every sample exactly once; samples left in the queues form its last batches. With ``weights``
    there are no epochs: each sample comes from a source drawn by weight, and an exhausted source restarts.

    The order is a function of the seed alone. To resume, consumed samples are read again and discarded.
    """

    def __init__(
        self,
        sources: Sequence[str],
        batch_size: int,
        steps: int,
        seed: int = 0,
        world_size: int = 1,
        rank: int = 0,
        buffer: int = 1024,
        weights: Sequence[float] | None = None,
        media_root: str | None = None,
    ) -> None:
        """
        Args:
            sources: as :func:`data_files` takes them.
            batch_size: samples of a batch on one rank.
            steps: batches to yield.
            seed: seed of the order.
            world_size: number of ranks.
            rank: this one.
            buffer: samples in memory, from which the next one is drawn.
            weights: relative weight of each source; None for epochs over all of them.
            media_root: folder that relative media paths are resolved against.

        Raises:
            UserError: a file does not exist, or a number is out of range.
        """
        if batch_size < 1 or steps < 1 or buffer < 1:
            found = f"{batch_size}, {steps} and {buffer}"
            raise UserError(f"batch_size, steps and the buffer must be at least 1, found {found}")
        self.files = [data_files(source) for source in sources]
        self.batch_size, self.steps, self.seed, self.buffer = batch_size, steps, seed, buffer
        self.world_size, self.rank, self.weights, self.media_root = world_size, rank, weights, media_root
        self._start = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[Sample]]:
        worker = get_worker_info()
        mine, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for batch in islice(self.global_batches(), self._start + mine, self.steps, workers):
            yield batch[self.rank :: self.world_size]

    def global_batches(self) -> Iterator[list[Sample]]:
        """The global batches of all ranks, without end."""
        size = self.batch_size * self.world_size
        queues: dict[str, list[Sample]] = {}
        epochs = map(self._epoch, count()) if self.weights is None else [self._mixture()]
        for samples in epochs:
            for sample in samples:
                queue = queues.setdefault(sample.modality, [])
                queue.append(sample)
                if len(queue) == size:
                    yield queues.pop(sample.modality)
            yield from split_batches(queues.values(), size, self.world_size)
            queues.clear()

    def state_dict(self, consumed: int) -> dict[str, Any]:
        """The state from which ``load_state_dict`` resumes after ``consumed`` batches."""
        return {"consumed": consumed, "order": self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Skip the batches already consumed.

        Raises:
            UserError: a setting that determines the order has changed.
        """
        for name, value in self._order().items():
            if state["order"][name] != value:
                found = f"{name} was {state['order'][name]}, now it is {value}"
                raise UserError(f"cannot resume in the same order: {found}")
        self._start = state["consumed"]

    def _order(self) -> dict[str, Any]:
        return {
            "samples of a step": self.batch_size * self.world_size,
            "seed": self.seed,
            "buffer": self.buffer,
            "weights": None if self.weights is None else list(self.weights),
        }

    def _epoch(self, epoch: int) -> Iterator[Sample]:
        """All samples of all sources once."""
        random = np.random.default_rng([self.seed, epoch])
        files = [file for source in self.files for file in source]
        found = 0
        samples = (sample for index in random.permutation(len(files)) for sample in self._read(files[index]))
        for sample in self._shuffled(samples, random):
            found += 1
            yield sample
        if not found:
            raise UserError(f"{', '.join(map(str, files))}: there are no samples to train on")

    def _mixture(self) -> Iterator[Sample]:
        assert self.weights is not None
        random = np.random.default_rng([self.seed])
        share = np.asarray(self.weights) / sum(self.weights)
        streams = [self._endless(number) for number in range(len(self.files))]
        drawn = (next(streams[random.choice(len(streams), p=share)]) for _ in count())
        yield from self._shuffled(drawn, random)

    def _endless(self, source: int) -> Iterator[Sample]:
        for turn in count():
            random = np.random.default_rng([self.seed, source, turn])
            empty = True
            for index in random.permutation(len(self.files[source])):
                for sample in self._read(self.files[source][index]):
                    empty = False
                    yield sample
            if empty:
                raise UserError(f"{self.files[source][0]}: there are no samples to train on")

    def _shuffled(self, samples: Iterator[Sample], random: np.random.Generator) -> Iterator[Sample]:
        held: list[Sample] = []
        for sample in samples:
            if len(held) < self.buffer:
                held.append(sample)
                continue
            drawn = random.integers(self.buffer)
            held[drawn], sample = sample, held[drawn]
            yield sample
        random.shuffle(held)  # type: ignore[arg-type]  # a list will do
        yield from held

    def _read(self, file: Any) -> Iterator[Sample]:
        return stream_samples(file, media_root=self.media_root, convert=False)
