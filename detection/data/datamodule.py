"""The LightningDataModule of detection: from files of boxes to batches with a prompt for each image."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, cast

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from unimoe.data import ModalityBatchSampler
from unimoe.detection.model.modeling import DynamicDinoForObjectDetection
from unimoe.errors import UserError
from unimoe.training.loader import ResumableLoader
from unimoe.training.ranks import data_parallel_rank, data_parallel_size, even_share

from .annotations import DetectionSet
from .cached import CachedEvalDataset, CachedTrainDataset
from .dataset import EvalDataset, TrainDataset
from .formats import read_detection
from .sampling import PromptSampler, SamplingConfig
from .transforms import IMAGENET_MEAN, IMAGENET_STD, Augment, AugmentConfig, resize_for

logger = logging.getLogger(__name__)


class HasDetector(Protocol):
    """The part of the LightningModule that the data depends on."""

    model: DynamicDinoForObjectDetection
    tokenizer: PreTrainedTokenizerBase


class SeededSampler(ModalityBatchSampler):
    """Pairs each index with a seed that follows from the run's seed, the step and the place in the global
    batch: however many ranks share it, images and prompts are the same."""

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:  # type: ignore[override]
        for batch in super().__iter__():
            first = (self.seed * 1_000_003 + self.yielded) * 4099 + self.rank
            yield [(index, first + place * self.world_size) for place, index in enumerate(batch)]


class DetectionData(LightningDataModule):
    """Training, validation and test data of a detector."""

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        images: str | dict[str, str] | None = None,
        steps: int = 1000,
        batch_size: int = 16,
        augment: AugmentConfig | None = None,
        prompts: SamplingConfig | None = None,
        cache_features: bool | str = False,
        copies: int = 1,
        num_workers: int = 0,
        seed: int = 0,
    ):
        """
        Args:
            train: COCO or LVIS .json, ODVG .jsonl, or a YOLO data.yaml.
            val: the same, for the average precision after training.
            test: the same, for ``unimoe test``.
            images: folder of the images, where it is not the files' own; or one for each of train, val and
                test.
            steps: optimizer steps; the data is repeated as often as that takes.
            batch_size: images of a batch on each device.
            augment: random changes of training images.
            prompts: how the prompts of training images are drawn.
            cache_features: run the frozen backbone once over all images and keep its maps on disk; a path
                says where (true: ``features`` beside the output folder).
            copies: with cache_features: augmented views of each training image.
            num_workers: processes that prepare batches.
            seed: seed of the order of images, their prompts and, without cache_features, their augmentation.

        Raises:
            UserError: a number is below 1, or ``images`` names an unknown split.
        """
        super().__init__()
        if min(steps, batch_size, copies) < 1:
            raise UserError(
                f"data.steps, data.batch_size and data.copies must be at least 1, found {steps}, {batch_size}"
                f" and {copies}"
            )
        if copies > 1 and not cache_features:
            logger.warning("data.copies is %d, which has no effect without data.cache_features", copies)
        self.files = {"train": train, "val": val, "test": test}
        self.images = images if isinstance(images, dict) else dict.fromkeys(self.files, images)
        if unknown := sorted(self.images.keys() - self.files.keys()):
            raise UserError(f"data.images has {unknown[0]!r}, expected train, val and test")
        self.steps, self.batch_size, self.seed = steps, batch_size, seed
        self.augment, self.prompts = augment or AugmentConfig(), prompts or SamplingConfig()
        self.cache_features, self.copies, self.num_workers = cache_features, copies, num_workers
        self.sets: dict[str, DetectionSet] = {}

    def setup(self, stage: str) -> None:
        """Read the annotations, and compare the sizes that they give with those of up to 1,000 images.

        Raises:
            UserError: a file or an entry is bad, or ``stage`` needs a file that the settings do not name.
        """
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ())
        for split in wanted:
            file = self.files[split]
            if file is not None and split not in self.sets:
                self.sets[split] = read_detection(file, self.images.get(split), split=split)
                self.sets[split].check_sizes()
        if stage == "fit":
            self._check_training(self.sets["train"])
        if stage != "fit" and wanted and wanted[0] not in self.sets:
            raise UserError(f"data.{wanted[0]} names no file; `unimoe {stage}` needs one")

    def _check_training(self, data: DetectionSet) -> None:
        file = self.files["train"]
        if not data.samples:
            raise UserError(f"{file}: there are no images to train on")
        if not data.annotated:
            raise UserError(f"{file} has no annotations to train on")
        if data.boxes_read and not data.boxes:
            raise UserError(f"{file}: none of its {data.boxes_read} boxes has an area inside its image")

    @property
    def module(self) -> HasDetector:
        """The module that this data is for."""
        assert self.trainer is not None
        return cast(HasDetector, self.trainer.lightning_module)

    # ---------------------------------------------------------------- training

    def train_dataloader(self) -> ResumableLoader:
        assert self.trainer is not None
        module, data = self.module, self.sets["train"]
        config = module.model.config
        training = TrainDataset(
            data,
            Augment(self.augment, config.image_mean or IMAGENET_MEAN, config.image_std or IMAGENET_STD),
            PromptSampler(data.names, module.tokenizer, self.prompts),
        )
        items: TrainDataset | CachedTrainDataset = training
        if self.features is not None:
            if any(parameter.requires_grad for parameter in module.model.backbone.parameters()):
                raise UserError("data.cache_features needs a frozen backbone; set model.freeze_encoders")
            items = CachedTrainDataset.of(training, self.copies, self.features, module.model)
        ranks, rank = data_parallel_size(self.trainer), data_parallel_rank(self.trainer)
        sampler = SeededSampler(
            ["image"] * len(items),
            self.batch_size,
            seed=self.seed,
            world_size=ranks,
            rank=rank,
            steps=self.steps * self.trainer.accumulate_grad_batches,
        )
        return ResumableLoader(
            items, batch_sampler=sampler, collate_fn=items.collate, num_workers=self.num_workers
        )

    @property
    def features(self) -> Path | None:
        """Folder of the backbone's maps, None without them."""
        if isinstance(self.cache_features, str):
            return Path(self.cache_features)
        if not self.cache_features:
            return None
        assert self.trainer is not None
        return Path(self.trainer.default_root_dir) / ".." / "features"

    # ---------------------------------------------------------------- evaluation

    def val_dataloader(self) -> DataLoader | list:
        return self._eval_dataloader("val") if "val" in self.sets else []

    def test_dataloader(self) -> DataLoader:
        return self._eval_dataloader("test")

    def _eval_dataloader(self, split: str) -> DataLoader:
        assert self.trainer is not None
        share = even_share(len(self.sets[split].samples), self.trainer)
        return eval_dataloader(
            self.sets[split], self.module.model, self.features, self.batch_size, self.num_workers, share
        )


def eval_dataloader(
    data: DetectionSet,
    model: DynamicDinoForObjectDetection,
    features: Path | None = None,
    batch_size: int = 16,
    num_workers: int = 0,
    chosen: Sequence[int] | None = None,
    skip_unreadable: bool = False,
) -> DataLoader:
    """The images of a set, whole and in order, as batches of :class:`EvalBatch`.

    Args:
        data: the set.
        model: whose backbone sees the images.
        features: folder to keep the backbone's maps in.
        batch_size: images of a batch.
        num_workers: processes that prepare batches.
        chosen: rows of ``data.samples`` (default: all).
        skip_unreadable: log an image that cannot be read and leave it out, instead of raising.
    """
    images = EvalDataset(data, resize_for(model.config), skip_unreadable)
    sampler = chosen if chosen is not None else range(len(images))
    if features is None:
        return DataLoader(
            images, batch_size, sampler=sampler, collate_fn=images.collate, num_workers=num_workers
        )
    cached = CachedEvalDataset.of(images, features, model)
    return DataLoader(cached, batch_size, sampler=sampler, collate_fn=cached.collate)
