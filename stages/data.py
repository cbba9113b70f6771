"""The one LightningDataModule of all stages: files of samples in, batches of like with like out.

files -> Samples -> ModalityBatchSampler (steps) -> Collator (cached features) -> batches
files -> SampleStream (steps)                    -> Collator                   -> batches
"""

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


class StageData(LightningDataModule):
    """Training and validation data of a stage."""

    def __init__(
        self,
        train: str | list[str] | dict[str, int | float],
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        steps: int = 1000,
        batch_size: int = 8,
        cache_features: bool | str = False,
        media_root: str | None = None,
        max_length: int | None = None,
        overflow: Overflow = "error",
        pack: int | None = None,
        stream: bool = False,
        buffer: int = 1024,
        num_workers: int = 0,
        seed: int = 0,
    ):
        """
        Args:
            train: file(s) of training samples: LLaVA JSON, messages JSON or JSONL, parquet or arrow,
                WebDataset shards (``set-{000..099}.tar``). A list is one pool, whose batches hold samples of
                the same modalities. ``{file: weight}`` with fractions (0.7) says what share of the samples
                each file gives. ``{file: number}`` with whole numbers says how many samples of each file
                every batch holds; ``batch_size`` is then their sum.
            val: file(s) for the validation loss.
            test: file(s) for ``unimoe test``.
            steps: optimizer steps of the stage; the data is gone through as often as that takes.
            batch_size: samples of a batch on each device.
            cache_features: run frozen encoders once over all media and keep their output on disk; a path says
                where (true: ``features`` beside the stage's output folder).
            media_root: folder that relative media paths start from (default: that of the samples' file).
            max_length: longest sample in tokens.
            overflow: what to do with a longer one: ``error`` stops and names it, ``truncate`` removes its end
                (never media, nor all answers), ``drop`` skips it with a warning.
            pack: put the samples of a batch one after another into rows of up to so many tokens, without
                padding, where they do not see one another (default: one sample a row, in parts of like
                length).
            stream: read the training files while training, and hold only ``buffer`` samples.
            buffer: samples among which the next is drawn, with ``stream``.
            num_workers: processes that prepare batches.
            seed: of the order of samples.
        """
        super().__init__()
        numbers = list(train.values()) if isinstance(train, dict) else []
        if not all(0 < number < float("inf") for number in numbers):
            raise UserError(f"data.train: every file needs a number above 0, found {train}")
        counts = [number for number in numbers if isinstance(number, int)]
        self.mix = counts if counts and len(counts) == len(numbers) else None
        self.weights = [float(number) for number in numbers] if self.mix is None and numbers else None
        self.files = {"train": _files(train), "val": _files(val), "test": _files(test)}
        if steps < 1 or batch_size < 1:
            raise UserError(
                f"data.steps and data.batch_size must be at least 1, found {steps} and {batch_size}"
            )
        self.steps, self.batch_size, self.seed = steps, batch_size, seed
        if pack is not None and pack < 1:
            raise UserError(f"data.pack must be at least 1, found {pack}")
        if stream and (cache_features or self.mix is not None):
            found = "cache_features" if cache_features else "whole numbers of each file"
            raise UserError(f"data.stream reads samples as they come, which does not go with {found}")
        if self.mix is not None:
            self.batch_size = sum(self.mix)
        self.overflow: Overflow = overflow
        self.pack, self.stream, self.buffer = pack, stream, buffer
        self.cache_features, self.media_root = cache_features, media_root
        self.max_length, self.num_workers = max_length, num_workers
        self.samples: dict[str, list[Sample]] = {}
        self.sizes: dict[str, list[int]] = {}
        """Samples of each file, in order."""
        self._collator: Collator | None = None

    def setup(self, stage: str) -> None:
        """Read the samples (not their media). Raises UserError naming file and line of a bad one."""
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ())
        for split in splits:
            if split == "train" and self.stream:
                continue
            if split not in self.samples:
                read = [read_samples(file, media_root=self.media_root) for file in self.files[split]]
                self.samples[split] = [sample for samples in read for sample in samples]
                self.sizes[split] = [len(samples) for samples in read]
        if stage == "fit" and not self.files["train"]:
            raise UserError("data.train names no files")
        if stage != "fit" and not self.samples[splits[0]]:
            raise UserError(f"data.{splits[0]} names no samples; `unimoe {stage}` needs some")

    def collator(self) -> Collator:
        """What makes batches; with ``cache_features`` the frozen encoders run here, once over all media."""
        if self._collator is None:
            trainer: Any = self.trainer
            module = trainer.lightning_module
            features = None
            if self.cache_features:
                folder = self.cache_features
                if not isinstance(folder, str):
                    folder = Path(trainer.default_root_dir) / ".." / "features"
                samples = [sample for split in self.samples.values() for sample in split]
                features = fill_cache(module.model, module.processor, folder, samples, trainer)
            self._collator = Collator(module.processor, self.max_length, features, self.overflow)
        return self._collator

    def train_dataloader(self) -> ResumableLoader:
        assert self.trainer is not None
        settings: dict[str, Any] = {
            "seed": self.seed,
            "steps": self.steps * self.trainer.accumulate_grad_batches,
            "world_size": data_parallel_size(self.trainer),
            "rank": data_parallel_rank(self.trainer),
        }
        if self.stream:
            shuffle = {"buffer": self.buffer, "weights": self.weights, "media_root": self.media_root}
            stream = SampleStream(self.files["train"], self.batch_size, **shuffle, **settings)
            return self._loader(stream, batch_size=None)
        if self.mix is not None:
            sampler: StepSampler = MixedBatchSampler(self.sizes["train"], self.mix, **settings)
        else:
            kinds = [sample.modality for sample in self.samples["train"]]
            settings |= {"sizes": self.sizes["train"], "weights": self.weights}
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
        """Batches of ``samples`` (a list, or a SampleStream) in the order that is given as to DataLoader."""
        collator = self.collator()
        return ResumableLoader(
            samples,
            collate_fn=partial(collator.packed, length=self.pack) if self.pack else collator.bucket_by_length,
            num_workers=self.num_workers,
            persistent_workers=False,
            **order,
        )


def _files(files: str | list[str] | dict[str, int | float] | None) -> list[str]:
    if files is None:
        return []
    return [files] if isinstance(files, str) else list(files)
