"""The LightningDataModule of detection: files of boxes in, batches with a prompt for each picture out."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from unimoe.data import ModalityBatchSampler
from unimoe.detection.model.modeling import DynamicDinoForObjectDetection
from unimoe.errors import UserError
from unimoe.training.loader import ResumableLoader
from unimoe.training.ranks import data_parallel_rank, data_parallel_size

from .annotations import DetectionSet
from .cached import CachedEvalDataset, CachedTrainDataset
from .dataset import EvalDataset, TrainDataset
from .formats import read_detection
from .sampling import PromptSampler, SamplingConfig
from .transforms import Augment, AugmentConfig, resize_for

if TYPE_CHECKING:
    from unimoe.detection.module import DetectionModule


logger = logging.getLogger(__name__)


class SeededSampler(ModalityBatchSampler):
    """Gives each index with a seed of its own, which follows from the run's seed, the step and the place in
    the global batch: however many ranks share it, pictures and prompts are the same."""

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
            images: folder of the pictures, where it is not the files' own; or one for each of train, val and
                test.
            steps: optimizer steps; the data is gone through as often as that takes.
            batch_size: pictures of a batch on each device.
            augment: random changes of training pictures.
            prompts: what training pictures are asked for.
            cache_features: run the frozen backbone once over all pictures and keep its maps on disk; a path
                says where (true: ``features`` beside the output folder).
            copies: with cache_features: augmented views of each training picture.
            num_workers: processes that prepare batches.
            seed: of the order of pictures, their prompts and, without cache_features, their augmentation.
        """
        super().__init__()
        if min(steps, batch_size, copies) < 1:
            raise UserError(
                f"data.steps, data.batch_size and data.copies must be at least 1, found {steps}, {batch_size}"
                f" and {copies}"
            )
        if copies > 1 and not cache_features:
            logger.warning("data.copies is %d, which means nothing without data.cache_features", copies)
        self.files = {"train": train, "val": val, "test": test}
        self.images = images if isinstance(images, dict) else dict.fromkeys(self.files, images)
        if unknown := sorted(self.images.keys() - self.files.keys()):
            raise UserError(f"data.images has {unknown[0]!r}, expected train, val and test")
        self.steps, self.batch_size, self.seed = steps, batch_size, seed
        self.augment, self.prompts = augment or AugmentConfig(), prompts or SamplingConfig()
        self.cache_features, self.copies, self.num_workers = cache_features, copies, num_workers
        self.sets: dict[str, DetectionSet] = {}

    def setup(self, stage: str) -> None:
        """Read the annotations (not the pictures). Raises UserError naming file and entry of a bad one."""
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ())
        for split in wanted:
            file = self.files[split]
            if file is not None and split not in self.sets:
                self.sets[split] = read_detection(file, self.images.get(split), split=split)
        if stage == "fit" and not self.sets["train"].samples:
            raise UserError(f"{self.files['train']}: there are no pictures to train on")
        if stage != "fit" and wanted and wanted[0] not in self.sets:
            raise UserError(f"data.{wanted[0]} names no file; `unimoe {stage}` needs one")

    @property
    def module(self) -> "DetectionModule":
        assert self.trainer is not None
        return cast("DetectionModule", self.trainer.lightning_module)

    # ---------------------------------------------------------------- training

    def train_dataloader(self) -> ResumableLoader:
        assert self.trainer is not None
        module, data = self.module, self.sets["train"]
        config: Any = module.model.config
        training = TrainDataset(
            data,
            Augment(self.augment, config.image_mean, config.image_std),
            PromptSampler(data.names, module.tokenizer, self.prompts),
        )
        items: Any = training
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
        """Folder of the backbone's maps."""
        if isinstance(self.cache_features, str):
            return Path(self.cache_features)
        folder = Path(self.trainer.default_root_dir) / ".." / "features"  # type: ignore[union-attr]
        return folder if self.cache_features else None

    # ---------------------------------------------------------------- evaluation

    def val_dataloader(self) -> DataLoader | list:
        return self._eval_dataloader("val") if "val" in self.sets else []

    def test_dataloader(self) -> DataLoader:
        return self._eval_dataloader("test")

    def _eval_dataloader(self, split: str) -> DataLoader:
        """This rank's share of the pictures: as many as any other's, so that all take the same steps."""
        assert self.trainer is not None
        count = len(self.sets[split].samples)
        ranks, rank = data_parallel_size(self.trainer), data_parallel_rank(self.trainer)
        share = [place % count for place in range(rank, count + -count % ranks, ranks)]
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
) -> DataLoader:
    """The pictures of a set, whole and in order, as batches of EvalBatch.

    Args:
        data: the set.
        model: whose backbone sees the pictures.
        features: folder to keep the backbone's maps in.
        batch_size: pictures of a batch.
        num_workers: processes that prepare batches.
        chosen: rows of ``data.samples`` (default: all).
    """
    pictures = EvalDataset(data, resize_for(model.config))
    sampler = chosen if chosen is not None else range(len(pictures))
    if features is None:
        return DataLoader(
            pictures, batch_size, sampler=sampler, collate_fn=pictures.collate, num_workers=num_workers
        )
    cached = CachedEvalDataset.of(pictures, features, model)
    return DataLoader(cached, batch_size, sampler=sampler, collate_fn=cached.collate)
