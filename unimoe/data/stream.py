"""Batches of like with like out of files that are read as they are needed, never as a whole.

files in random order -> a buffer from which samples are drawn -> one queue a kind -> global batches
"""

from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from unimoe.errors import UserError

from .read import data_files, stream_samples
from .sample import Sample
from .sampler import cut_batches


class SampleStream(IterableDataset):
    """Yields ``steps`` lists of Samples, each of one kind: a ModalityBatchSampler that sees only a buffer.

    Every rank and every loader worker reads the same samples in the same order and keeps its own share of
    each global batch, so at every step all ranks have the same kind; media are decoded only by whom they
    belong to. An epoch holds every sample exactly once; what it leaves in the queues makes its last batches.
    With ``weights`` there are no epochs: each sample comes from a source drawn by weight, a source that is at
    its end begins anew.

    The order is a function of the seed alone. To resume, what was consumed is read and thrown away.
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
        """``sources`` as :func:`data_files` takes them; ``batch_size`` is that of one rank, ``buffer`` the
        number of samples in memory among which the next is drawn.

        Raises UserError when a file is not there."""
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
        """The batches of all ranks together, without end."""
        size = self.batch_size * self.world_size
        queues: dict[str, list[Sample]] = {}
        epochs = map(self._epoch, count()) if self.weights is None else [self._mixture()]
        for samples in epochs:
            for sample in samples:
                queue = queues.setdefault(sample.kind, [])
                queue.append(sample)
                if len(queue) == size:
                    yield queues.pop(sample.kind)
            yield from cut_batches(queues.values(), size, self.world_size)
            queues.clear()

    def state_dict(self, consumed: int) -> dict[str, Any]:
        """What ``load_state_dict`` needs to go on after so many batches."""
        return {"consumed": consumed, "order": self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Skip the batches already consumed. Raises UserError when what makes the order changed."""
        for name, value in self._order().items():
            if state["order"][name] != value:
                found = f"{name} was {state['order'][name]}, now it is {value}"
                raise UserError(f"cannot go on in the same order: {found}")
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
