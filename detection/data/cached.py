"""Datasets of images whose backbone maps are computed once.

Shapes: B images, N levels, C channels, h x w cells of a level.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from unimoe.detection.model.modeling import DynamicDinoForObjectDetection
from unimoe.detection.model.output import Target
from unimoe.detection.model.prompt import Prompt, PromptBatch

from .annotations import DetectionSet
from .batches import EvalBatch, TrainBatch
from .dataset import EvalDataset, TrainDataset, View
from .view_store import ViewStore, images_key


class CachedTrainDataset(Dataset):
    """Stored views of training images, each with a prompt drawn anew for (index, seed)."""

    def __init__(self, data: TrainDataset, store: ViewStore):
        self.data, self.store = data, store

    @classmethod
    def of(
        cls, data: TrainDataset, copies: int, folder: Path, model: DynamicDinoForObjectDetection
    ) -> "CachedTrainDataset":
        """``copies`` augmented views of each image; their maps are kept in ``folder``."""
        config = data.augment.config
        made_of = {"augment": asdict(config), "copies": copies}
        return cls(data, _stored(folder, data.data, model, _Views(data, copies), config.longest, made_of))

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

    def collate(self, items: Sequence[tuple[int, Prompt, Target]]) -> TrainBatch:
        indices, prompts, targets = zip(*items, strict=True)
        return TrainBatch(
            self.store.pixel_masks(indices),
            list(prompts),
            PromptBatch.stack(prompts),
            list(targets),
            image_features=self.store.batch(indices),
        )


class CachedEvalDataset(Dataset):
    """Stored maps of whole images: the index of an image, for ``collate``."""

    def __init__(self, data: DetectionSet, store: ViewStore):
        self.data, self.store = data, store

    @classmethod
    def of(
        cls, images: EvalDataset, folder: Path, model: DynamicDinoForObjectDetection
    ) -> "CachedEvalDataset":
        """Every image as it is; their maps are kept in ``folder``."""
        made_of = {"size": model.config.image_size}
        views, longest = _Whole(images), images.resize.longest
        return cls(images.data, _stored(folder, images.data, model, views, longest, made_of))

    def __len__(self) -> int:
        return len(self.data.samples)

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, indices: Sequence[int]) -> EvalBatch:
        samples = [self.data.samples[index] for index in indices]
        sizes = [sample.size or sample.load().size for sample in samples]
        maps = self.store.batch(indices)
        return EvalBatch(list(indices), sizes, self.store.pixel_masks(indices), image_features=maps)


class _Views(Sequence[View]):
    """``copies`` augmented views of each training image, the same ones whatever the run's seed: runs share
    the store."""

    def __init__(self, data: TrainDataset, copies: int):
        self.data, self.copies = data, copies

    def __len__(self) -> int:
        return len(self.data) * self.copies

    def __getitem__(self, index: int) -> View:  # type: ignore[override]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(index)
            return self.data.view(self.data.data.samples[index % len(self.data)])


class _Whole(Sequence[View]):
    """Images as they are evaluated; their boxes are not needed."""

    def __init__(self, images: EvalDataset):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> View:  # type: ignore[override]
        image = self.images.data.samples[index].load()
        return View(self.images.resize(image), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


def _stored(
    folder: Path,
    data: DetectionSet,
    model: DynamicDinoForObjectDetection,
    views: Sequence[View],
    side: int,
    made_of: dict[str, Any],
) -> ViewStore:
    """The maps of some views of a set's images; see :meth:`ViewStore.of`."""
    boxes = [sample.boxes_M4.tolist() for sample in data.samples]
    made_of = {**made_of, "images": images_key(data.samples), "boxes": boxes}
    return ViewStore.of(folder.resolve(), model, views, side, made_of)
