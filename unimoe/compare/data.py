"""The data of a comparison: conversations as a stage takes them, or plain text (text.py).

The order of the training data depends on the seed alone, so that all designs of a seed see the same batches.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch.utils.data import DataLoader

from unimoe.data import Collator, FeatureCache, ModalityBatchSampler, Sample, read_samples
from unimoe.data.mixed_sampler import MixedBatchSampler
from unimoe.data.read import data_files, spread
from unimoe.files import file_hash
from unimoe.model.inputs import Batch

from .base import Base
from .config import CompareConfig, DataConfig
from .trunk import Row, batches_of

T = TypeVar("T")
Step = list[Batch]
"""Collated rows that run together, of an optimizer step or of a test set, in parts of similar length."""


class CompareData(Protocol):
    """Training batches, and batches of each file that is evaluated."""

    unit: str
    """Unit of the losses."""
    has_answers: bool
    """Whether a row is a question with its answer."""

    def train(self, seed: int, steps: int) -> Iterable[Step]:
        """The batches of one cell."""
        ...

    def evaluation(self, split: str) -> dict[str, list[Step]]:
        """``val`` or ``test``: batches by the name of the file."""
        ...

    def loss(self, name: str, nats: float) -> float:
        """The loss on an evaluated file in ``unit``, from nats a token."""
        ...

    def kind(self, name: str) -> str | None:
        """What the tokens of an evaluated file count as in routing statistics; None: each as its modality."""
        ...


class Conversations:
    """Samples with media, whose frozen encoders run once."""

    unit, has_answers = "nats per token", True

    def __init__(self, config: CompareConfig, base: Base, features: str):
        """
        Args:
            config: names the files.
            base: has the processor and the encoders.
            features: folder of the encoders' features.

        Raises:
            UserError: a file is missing, empty or faulty.
        """
        data, self.config = config.data, config

        def read(file: str) -> list[Sample]:
            return read_samples(file, media_root=data.media_root)

        self.pools = [read(file) for file in data.train_files]
        self.held = {
            split: {name: spread(read(file), data.eval_samples) for name, file in named.items()}
            for split, named in data.eval_files.items()
        }
        cache = FeatureCache(Path(features).resolve(), base.processor, base.encoders)
        held = [samples for named in self.held.values() for samples in named.values()]
        cache.fill([sample for samples in (*self.pools, *held) for sample in samples])
        self.collator, self.trunk = Collator(base.processor, data.max_length, cache), base.trunk
        self._held_rows: dict[int, Row] = {}
        self._rows: dict[int, Row] = {}
        """Rows of the training samples of one seed, which all designs of the seed share."""
        self._seed: int | None = None

    def train(self, seed: int, steps: int) -> Iterable[Step]:
        if seed != self._seed:
            self._seed, self._rows = seed, {}
        data, samples = self.config.data, [sample for pool in self.pools for sample in pool]
        sizes = [len(pool) for pool in self.pools]
        if data.counts is not None:
            sampler: Any = MixedBatchSampler(sizes, data.counts, steps, seed)
        else:
            shares = {"sizes": sizes, "weights": data.shares} if data.shares else {}
            kinds = [sample.modality for sample in samples]
            sampler = ModalityBatchSampler(kinds, self.config.batch_size, seed, steps=steps, **shares)
        collate = partial(self._batch, self._rows)
        return DataLoader(samples, batch_sampler=sampler, collate_fn=collate)  # type: ignore[arg-type]

    def _batch(self, known: dict[int, Row], samples: Sequence[Sample]) -> Step:
        """The samples as batches; through the trunk, where there is one, unless they are ``known``."""
        if self.trunk is None:
            return self.collator.bucket_by_length(samples)
        for sample in samples:
            if id(sample) not in known:
                known[id(sample)] = self.trunk.row(self.collator([sample]))
        return batches_of([known[id(sample)] for sample in samples])

    def evaluation(self, split: str) -> dict[str, list[Step]]:
        return {
            name: [self._batch(self._held_rows, part) for part in parts(samples, self.config.rows)]
            for name, samples in self.held[split].items()
        }

    def loss(self, name: str, nats: float) -> float:
        return nats

    def kind(self, name: str) -> str | None:
        return None


def parts(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """The items in runs of ``size``."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def data_fingerprints(data: DataConfig) -> dict[str, str]:
    """SHA-256 of every data file.

    Raises:
        UserError: a file is missing.
    """
    held = [file for named in data.eval_files.values() for file in named.values()]
    return {str(file): file_hash(file) for name in (*data.train_files, *held) for file in data_files(name)}
