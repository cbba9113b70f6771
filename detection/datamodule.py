"""The LightningDataModule of detection: files of boxes in, batches with a prompt for each picture out.

Shapes: B images, S x S pixels, N levels of the backbone, C channels, h x w cells of a level.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from unimoe.data import ModalityBatchSampler
from unimoe.errors import UserError
from unimoe.training.loader import ResumableLoader

from .data import EvaluationData, ImageBatch, TrainingData, View
from .dataset import DetectionSample, DetectionSet
from .features import FeatureStore, pictures_key
from .formats import read_detection
from .modeling import DynamicDinoForObjectDetection
from .output import Target
from .prompt import Prompt, PromptBatch
from .sampling import PromptSampler, SamplingConfig
from .transforms import Augment, AugmentConfig, Resize

if TYPE_CHECKING:
    from .module import DetectionModule


logger = logging.getLogger(__name__)


@dataclass
class Batch:
    """What a training step needs: pixels, or the backbone's maps of them."""

    pixel_mask: Tensor | None
    """[B, S, S] int64; None where nothing is padded."""
    prompts: list[Prompt]
    prompt_batch: PromptBatch
    targets: list[Target]
    pixel_values: Tensor | None = None
    """[B, 3, S, S]"""
    image_features: list[Tensor] | None = None
    """N maps [B, C, h, w]."""

    def to(self, device: torch.device | str, **kwargs: Any) -> "Batch":
        targets = [Target(one.boxes_M4.to(device), one.names_M.to(device)) for one in self.targets]
        return replace(_moved(self, device), prompt_batch=self.prompt_batch.to(device), targets=targets)


@dataclass
class Question:
    """Pictures to be searched for every name of their set."""

    samples: list[DetectionSample]
    sizes: list[tuple[int, int]]
    """(width, height) in the pixels of the annotations."""
    pixel_mask: Tensor | None
    pixel_values: Tensor | None = None
    image_features: list[Tensor] | None = None

    def to(self, device: torch.device | str, **kwargs: Any) -> "Question":
        return _moved(self, device)


def _moved(batch: Any, device: torch.device | str) -> Any:
    """With the pictures on ``device``."""
    maps = batch.image_features
    return replace(
        batch,
        pixel_mask=None if batch.pixel_mask is None else batch.pixel_mask.to(device),
        pixel_values=None if batch.pixel_values is None else batch.pixel_values.to(device),
        image_features=None if maps is None else [level.to(device) for level in maps],
    )


class SeededSampler(ModalityBatchSampler):
    """Gives each index with a seed of its own, which follows from the run's seed and the step alone."""

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:  # type: ignore[override]
        for batch in super().__iter__():
            first = (self.seed * 1_000_003 + self.yielded) * 4099 + self.rank * len(batch)
            yield [(index, first + place) for place, index in enumerate(batch)]


class DetectionData(LightningDataModule):
    """Training, validation and test data of a detector."""

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        images: str | None = None,
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
            images: folder of the pictures, where it is not the files' own.
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
        self.images, self.steps, self.batch_size, self.seed = images, steps, batch_size, seed
        self.augment, self.prompts = augment or AugmentConfig(), prompts or SamplingConfig()
        self.cache_features, self.copies, self.num_workers = cache_features, copies, num_workers
        self.sets: dict[str, DetectionSet] = {}

    def setup(self, stage: str) -> None:
        """Read the annotations (not the pictures). Raises UserError naming file and entry of a bad one."""
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ())
        for split in wanted:
            file = self.files[split]
            if file is not None and split not in self.sets:
                self.sets[split] = read_detection(file, self.images, split=split)
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
        config = module.model.config
        training = TrainingData(
            data,
            Augment(self.augment, config.image_mean, config.image_std),
            PromptSampler(data.names, module.tokenizer, self.prompts),
        )
        items: Dataset = Drawn(training)
        if self.features is not None:
            if any(parameter.requires_grad for parameter in module.model.backbone.parameters()):
                raise UserError("data.cache_features needs a frozen backbone; set model.freeze_encoders")
            views = Views(training, self.copies)
            made_of = {"augment": asdict(self.augment), "copies": self.copies}
            store = stored(self.features, data, module.model, views, self.augment.longest, made_of)
            items = Cached(training, store, self.copies)
        sampler = SeededSampler(
            ["image"] * len(cast(Any, items)),
            self.batch_size,
            seed=self.seed,
            world_size=self.trainer.world_size,
            rank=self.trainer.global_rank,
            steps=self.steps * self.trainer.accumulate_grad_batches,
        )
        return ResumableLoader(
            items, batch_sampler=sampler, collate_fn=cast(Any, items).collate, num_workers=self.num_workers
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
        return self._questions("val") if "val" in self.sets else []

    def test_dataloader(self) -> DataLoader:
        return self._questions("test")

    def _questions(self, split: str) -> DataLoader:
        return questions(
            self.sets[split], self.module.model, self.features, self.batch_size, self.num_workers
        )


def questions(
    data: DetectionSet,
    model: DynamicDinoForObjectDetection,
    features: Path | None = None,
    batch_size: int = 16,
    num_workers: int = 0,
) -> DataLoader:
    """Every picture of a set, whole and in order, as batches of Question; ``features`` is the folder to keep
    the backbone's maps in."""
    pictures = EvaluationData(data, resize_for(model.config))
    if features is None:
        return DataLoader(pictures, batch_size, collate_fn=asked, num_workers=num_workers)
    made_of = {"size": model.config.image_size}
    store = stored(features, data, model, Whole(pictures), pictures.resize.longest, made_of)
    cached = CachedPictures(data, store)
    return DataLoader(cached, batch_size, collate_fn=cached.collate)


def stored(
    folder: Path,
    data: DetectionSet,
    model: DynamicDinoForObjectDetection,
    views: Sequence[View],
    side: int,
    made_of: dict[str, Any],
) -> FeatureStore:
    """The maps of some views of a set's pictures; see :meth:`FeatureStore.of`."""
    boxes = [sample.boxes_M4.tolist() for sample in data.samples]
    made_of = {**made_of, "pictures": pictures_key(data.samples), "boxes": boxes}
    return FeatureStore.of(folder.resolve(), model, views, side, made_of)


def resize_for(config: Any) -> Resize:
    """How a model with this configuration wants its pictures."""
    size = config.image_size
    shorter, longest = (size, size) if isinstance(size, int) else size
    return Resize(shorter, longest, config.image_mean, config.image_std)


def asked(items: Sequence[Any]) -> Question:
    """Batches of EvaluationData as Questions."""
    images = EvaluationData.collate(items)
    return Question(images.samples, images.sizes, _needed(images), images.pixel_values)


def _needed(images: ImageBatch) -> Tensor | None:
    return None if bool(images.pixel_mask.all()) else images.pixel_mask


class Drawn(Dataset):
    """Training pictures augmented anew each time: (index, seed) -> item of TrainingData."""

    def __init__(self, data: TrainingData):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Prompt, Target, DetectionSample]:
        index, seed = key
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.data[index]

    @staticmethod
    def collate(items: Sequence[Any]) -> Batch:
        batch = TrainingData.collate(items)
        return Batch(
            _needed(batch.images),
            batch.prompts,
            batch.prompt_batch,
            batch.targets,
            pixel_values=batch.images.pixel_values,
        )


class Views(Sequence[View]):
    """``copies`` augmented views of each training picture, the same ones whatever the run's seed: runs share
    the store."""

    def __init__(self, data: TrainingData, copies: int):
        self.data, self.copies = data, copies

    def __len__(self) -> int:
        return len(self.data) * self.copies

    def __getitem__(self, index: int) -> View:  # type: ignore[override]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(index)
            return self.data.view(self.data.data.samples[index % len(self.data)])


class Whole(Sequence[View]):
    """Pictures as they are evaluated; their boxes are not needed."""

    def __init__(self, pictures: EvaluationData):
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> View:  # type: ignore[override]
        return View(self.pictures[index][0], torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


class Cached(Dataset):
    """Stored views of training pictures, each with a prompt drawn anew for (index, seed)."""

    def __init__(self, data: TrainingData, store: FeatureStore, copies: int):
        self.data, self.store, self.copies = data, store, copies

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Prompt, Target]:
        index, seed = key
        sample = self.data.data.samples[index % len(self.data)]
        boxes_K4, kept_K = self.store.boxes[index], self.store.kept[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            prompt, target = self.data.ask(sample, boxes_K4, kept_K, self.store.sizes[index])
        return index, prompt, target

    def collate(self, items: Sequence[tuple[int, Prompt, Target]]) -> Batch:
        indices, prompts, targets = zip(*items, strict=True)
        return Batch(
            self.store.pixel_masks(indices),
            list(prompts),
            PromptBatch.stack(prompts),
            list(targets),
            image_features=self.store.batch(indices),
        )


class CachedPictures(Dataset):
    """Stored maps of whole pictures: the index of a picture, for ``collate``."""

    def __init__(self, data: DetectionSet, store: FeatureStore):
        self.data, self.store = data, store

    def __len__(self) -> int:
        return len(self.data.samples)

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, indices: Sequence[int]) -> Question:
        samples = [self.data.samples[index] for index in indices]
        sizes = [sample.size or sample.load().size for sample in samples]
        maps = self.store.batch(indices)
        return Question(samples, sizes, self.store.pixel_masks(indices), image_features=maps)
