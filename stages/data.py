"""The one LightningDataModule of all stages: files of samples in, batches of like with like out.

files -> Samples -> ModalityBatchSampler (steps) -> Collator (cached features) -> batches
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import LightningDataModule
from torch.nn import functional as nnf

from unimoe.data import Collator, FeatureCache, ModalityBatchSampler, Sample, read_samples
from unimoe.data.mix import MixedBatchSampler
from unimoe.encoders import Encoder
from unimoe.errors import UserError
from unimoe.modeling import MEDIA_INPUTS, Encoded
from unimoe.training.loader import ResumableLoader, StepSampler

if TYPE_CHECKING:
    from .module import StageModule


class StageData(LightningDataModule):
    """Training and validation data of a stage."""

    def __init__(
        self,
        train: str | list[str] | dict[str, int],
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        steps: int = 1000,
        batch_size: int = 8,
        cache_features: bool | str = False,
        media_root: str | None = None,
        max_length: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ):
        """
        Args:
            train: file(s) of training samples: LLaVA JSON, messages JSON or JSONL. A list is one pool, whose
                batches hold samples of the same modalities. ``{file: number}`` says how many samples of each
                file every batch holds; ``batch_size`` is then their sum.
            val: file(s) for the validation loss.
            test: file(s) for ``unimoe test``.
            steps: optimizer steps of the stage; the data is gone through as often as that takes.
            batch_size: samples of a batch on each device.
            cache_features: run frozen encoders once over all media and keep their output on disk; a path says
                where (true: ``features`` beside the stage's output folder).
            media_root: folder that relative media paths start from (default: that of the samples' file).
            max_length: longest sample in tokens.
            num_workers: processes that prepare batches.
            seed: of the order of samples.
        """
        super().__init__()
        self.mix = list(train.values()) if isinstance(train, dict) else None
        self.files = {"train": _files(train), "val": _files(val), "test": _files(test)}
        if steps < 1 or batch_size < 1:
            raise UserError(
                f"data.steps and data.batch_size must be at least 1, found {steps} and {batch_size}"
            )
        self.steps, self.batch_size, self.seed = steps, batch_size, seed
        if self.mix is not None:
            self.batch_size = sum(self.mix)
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
            if split not in self.samples:
                read = [read_samples(file, media_root=self.media_root) for file in self.files[split]]
                self.samples[split] = [sample for samples in read for sample in samples]
                self.sizes[split] = [len(samples) for samples in read]
        if stage == "fit" and not self.samples["train"]:
            raise UserError(f"{', '.join(self.files['train'])}: there are no samples to train on")
        if stage != "fit" and not self.samples[splits[0]]:
            raise UserError(f"data.{splits[0]} names no samples; `unimoe {stage}` needs some")

    def collator(self) -> Collator:
        """What makes batches; with ``cache_features`` the frozen encoders run here, once over all media."""
        if self._collator is None:
            module = cast("StageModule", self.trainer.lightning_module)  # type: ignore[union-attr]
            features = None
            if self.cache_features:
                features = self._fill_cache(module)
            self._collator = Collator(module.processor, self.max_length, features=features)
        return self._collator

    def _fill_cache(self, module: "StageModule") -> FeatureCache:
        towers = {
            kind: cast(Encoder, tower)
            for kind, tower in module.model.model.encoders.items()
            if not any(p.requires_grad for p in tower.parameters())
        }
        folder = self.cache_features
        if not isinstance(folder, str):
            folder = Path(self.trainer.default_root_dir) / ".." / "features"  # type: ignore[union-attr]
        cache = FeatureCache(Path(folder).resolve(), module.processor, towers)
        cache.fill([s for samples in self.samples.values() for s in samples])
        return cache

    def train_dataloader(self) -> ResumableLoader:
        assert self.trainer is not None
        settings: dict[str, Any] = {
            "seed": self.seed,
            "steps": self.steps * self.trainer.accumulate_grad_batches,
            "world_size": self.trainer.world_size,
            "rank": self.trainer.global_rank,
        }
        if self.mix is not None:
            sampler: StepSampler = MixedBatchSampler(self.sizes["train"], self.mix, **settings)
        else:
            kinds = [sample.kind for sample in self.samples["train"]]
            sampler = ModalityBatchSampler(kinds, self.batch_size, **settings)
        return self._loader("train", sampler)

    def val_dataloader(self) -> ResumableLoader | list:
        return self._in_order("val")

    def test_dataloader(self) -> ResumableLoader | list:
        return self._in_order("test")

    def _in_order(self, split: str) -> ResumableLoader | list:
        assert self.trainer is not None
        if not self.samples.get(split):
            return []
        sampler = ModalityBatchSampler(
            [sample.kind for sample in self.samples[split]],
            self.batch_size,
            shuffle=False,
            world_size=self.trainer.world_size,
            rank=self.trainer.global_rank,
        )
        return self._loader(split, sampler)

    def _loader(self, split: str, sampler: StepSampler) -> ResumableLoader:
        return ResumableLoader(
            self.samples[split],  # type: ignore[arg-type]  # a list is a map-style data set
            batch_sampler=sampler,
            collate_fn=self.collator().by_length,
            num_workers=self.num_workers,
            persistent_workers=False,
        )

    @torch.no_grad()
    def encode(self, samples: list[Sample], kind: str) -> Encoded:
        """The frozen encoder's features of one medium of each sample: features_nSD, and lengths_n or None."""
        module = cast("StageModule", self.trainer.lightning_module)  # type: ignore[union-attr]
        encoder = module.model.model.encoders[kind]
        features: list[torch.Tensor] = []
        lengths: list[torch.Tensor] = []
        for start in range(0, len(samples), 16):
            batch = self.collator()(samples[start : start + 16])
            encoded = batch.get("encoded_media", {}).get(kind)
            if encoded is None:
                encoded = encoder(*(batch[name].to(module.device) for name in MEDIA_INPUTS[kind]))
            features.append(encoded[0].to(module.device))
            if encoded[1] is not None:
                lengths.append(encoded[1].to(module.device))
        longest = max(part.shape[1] for part in features)
        whole = torch.cat([nnf.pad(part, (0, 0, 0, longest - part.shape[1])) for part in features])
        return whole, torch.cat(lengths) if lengths else None


def _files(files: str | list[str] | dict[str, int] | None) -> list[str]:
    if files is None:
        return []
    return [files] if isinstance(files, str) else list(files)
