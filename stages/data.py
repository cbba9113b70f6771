"""The LightningDataModule of all stages: files of samples in, batches of one modality each out.

files -> Samples -> ModalityBatchSampler (steps) -> Collator (cached features) -> batches
files -> SampleStream (steps)                    -> Collator                   -> batches
"""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from unimoe.data import Collator, ModalityBatchSampler, Sample, read_samples
from unimoe.data.collate import Overflow
from unimoe.data.mixed_sampler import MixedBatchSampler
from unimoe.data.stream import SampleStream
from unimoe.errors import UserError
from unimoe.training.loader import ResumableLoader, StepSampler
from unimoe.training.ranks import data_parallel_rank, data_parallel_size

from .features import fill_cache

log = logging.getLogger(__name__)


@dataclass
class StageDataConfig:
    """Settings of :class:`StageData`, the keys under ``data:``."""

    train: str | list[str] | dict[str, int | float]
    """File(s) of training samples: LLaVA JSON, messages JSON or JSONL, parquet or arrow, WebDataset shards
    (``set-{000..099}.tar``). A list is one pool, whose batches hold samples of the same modalities.
    ``{file: weight}`` with fractions (0.7) gives each file's share of the samples. ``{file: number}`` with
    whole numbers gives the samples of each file in every batch; ``batch_size`` is then their sum."""

    val: str | list[str] | None = None
    """File(s) for the validation loss."""

    test: str | list[str] | None = None
    """File(s) for ``unimoe test``."""

    steps: int = 1000
    """Optimizer steps of the stage; the data is repeated as often as that takes."""

    batch_size: int = 8
    """Samples of a batch on each device."""

    cache_features: bool | str = False
    """Run frozen encoders once over all media and keep their outputs on disk, in this folder (true:
    ``features`` beside the stage's output folder)."""

    media_root: str | None = None
    """Folder that relative media paths start from (default: that of the samples' file)."""

    max_length: int | None = None
    """Longest sample in tokens."""

    overflow: Overflow = "error"
    """Treatment of longer samples: ``error`` stops and names the sample, ``truncate`` removes its end (never
    media, nor all answers), ``drop`` skips it with a warning."""

    pack: int | None = None
    """Pack the samples of a batch into rows of up to this many tokens, without padding and without attention
    between samples (default: one sample a row, in sub-batches of similar length)."""

    stream: bool = False
    """Read the training files during training, holding only ``buffer`` samples in memory."""

    buffer: int = 1024
    """Size of the shuffle buffer with ``stream``."""

    num_workers: int = 0
    """Processes that prepare batches."""

    seed: int = 0
    """Seed of the order of samples."""

    def __post_init__(self) -> None:
        numbers = list(self.train.values()) if isinstance(self.train, dict) else []
        if not all(0 < number < float("inf") for number in numbers):
            raise UserError(f"data.train: every file needs a number above 0, found {self.train}")
        if self.steps < 1 or self.batch_size < 1:
            found = f"{self.steps} and {self.batch_size}"
            raise UserError(f"data.steps and data.batch_size must be at least 1, found {found}")
        if self.pack is not None and self.pack < 1:
            raise UserError(f"data.pack must be at least 1, found {self.pack}")
        if self.stream and (self.cache_features or self.counts is not None):
            found = "cache_features" if self.cache_features else "whole numbers of each file"
            raise UserError(f"data.stream reads samples during training, which does not go with {found}")
        if self.buffer != StageDataConfig.buffer and not self.stream:
            log.warning("data.buffer is ignored without data.stream")
        if self.overflow != "error" and self.max_length is None:
            log.warning("data.overflow is ignored without data.max_length")

    @property
    def counts(self) -> list[int] | None:
        """Samples of each training file in every batch, where ``train`` says so."""
        numbers = list(self.train.values()) if isinstance(self.train, dict) else []
        counts = [number for number in numbers if isinstance(number, int)]
        return counts if counts and len(counts) == len(numbers) else None

    @property
    def weights(self) -> list[float] | None:
        """Each training file's share of the samples, where ``train`` says so."""
        if not isinstance(self.train, dict) or self.counts is not None:
            return None
        return [float(number) for number in self.train.values()] or None

    def files(self, split: str) -> list[str]:
        """Files of ``train``, ``val`` or ``test``."""
        named = getattr(self, split)
        return [named] if isinstance(named, str) else list(named or [])


class StageData(LightningDataModule):
    """Training, validation and test batches of a stage."""

    def __init__(self, **settings: Any):
        """
        Args:
            settings: the fields of :class:`StageDataConfig`.

        Raises:
            UserError: a setting out of range, or settings that exclude each other.
        """
        super().__init__()
        self.config = config = StageDataConfig(**settings)
        self.steps, self.batch_size = config.steps, sum(config.counts or [config.batch_size])
        self.samples: dict[str, list[Sample]] = {}
        self.sizes: dict[str, list[int]] = {}
        """Samples of each file, in order."""
        self._collator: Collator | None = None

    def setup(self, stage: str) -> None:
        """Read the samples (not their media).

        Raises:
            UserError: a bad sample, by file and line, or a split without samples.
        """
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ())
        for split in splits:
            if split == "train" and self.config.stream:
                continue
            if split not in self.samples:
                read = [
                    read_samples(file, media_root=self.config.media_root) for file in self.config.files(split)
                ]
                self.samples[split] = [sample for samples in read for sample in samples]
                self.sizes[split] = [len(samples) for samples in read]
        if stage == "fit" and not self.config.files("train"):
            raise UserError("data.train names no files")
        if stage != "fit" and not self.samples[splits[0]]:
            raise UserError(f"data.{splits[0]} names no samples; `unimoe {stage}` needs some")

    def collator(self) -> Collator:
        """What makes batches; with ``cache_features``, the frozen encoders run here once over all media."""
        if self._collator is None:
            trainer: Any = self.trainer
            module = trainer.lightning_module
            features = None
            if self.config.cache_features:
                folder = self.config.cache_features
                if not isinstance(folder, str):
                    folder = Path(trainer.default_root_dir) / ".." / "features"
                samples = [sample for split in self.samples.values() for sample in split]
                features = fill_cache(module.model, module.processor, folder, samples, trainer)
            self._collator = Collator(
                module.processor, self.config.max_length, features, self.config.overflow
            )
        return self._collator

    def train_dataloader(self) -> ResumableLoader:
        assert self.trainer is not None
        settings: dict[str, Any] = {
            "seed": self.config.seed,
            "steps": self.steps * self.trainer.accumulate_grad_batches,
            "world_size": data_parallel_size(self.trainer),
            "rank": data_parallel_rank(self.trainer),
        }
        config = self.config
        if config.stream:
            shuffle = {"buffer": config.buffer, "weights": config.weights, "media_root": config.media_root}
            stream = SampleStream(config.files("train"), self.batch_size, **shuffle, **settings)
            return self._loader(stream, batch_size=None)
        if config.counts is not None:
            sampler: StepSampler = MixedBatchSampler(self.sizes["train"], config.counts, **settings)
        else:
            kinds = [sample.modality for sample in self.samples["train"]]
            settings |= {"sizes": self.sizes["train"], "weights": config.weights}
            sampler = ModalityBatchSampler(kinds, self.batch_size, **settings)
        return self._loader(self.samples["train"], batch_sampler=sampler)

    def val_dataloader(self) -> ResumableLoader | list:
        return self._in_order("val")

    def test_dataloader(self) -> ResumableLoader | list:
        return self._in_order("test")

    def _in_order(self, split: str) -> ResumableLoader | list:
        assert self.trainer is not None
        if not self.samples.get(split):
            return []
        sampler = ModalityBatchSampler(
            [sample.modality for sample in self.samples[split]],
            self.batch_size,
            shuffle=False,
            world_size=data_parallel_size(self.trainer),
            rank=data_parallel_rank(self.trainer),
        )
        return self._loader(self.samples[split], batch_sampler=sampler)

    def _loader(self, samples: Any, **order: Any) -> ResumableLoader:
        """Batches of ``samples`` (a list or a SampleStream); ``order`` as DataLoader takes it."""
        collator, pack = self.collator(), self.config.pack
        return ResumableLoader(
            samples,
            collate_fn=partial(collator.packed, length=pack) if pack else collator.bucket_by_length,
            num_workers=self.config.num_workers,
            persistent_workers=False,
            **order,
        )
