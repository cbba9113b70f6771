"""Maps of a frozen backbone, computed once and read from disk in every step.

Shapes: V views, N levels, S the side of a view in pixels, C channels, h x w cells of a level.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from unimoe.detection.model.modeling import DynamicDinoForObjectDetection
from unimoe.files import atomic_folder

from .annotations import DetectionSample
from .dataset import View
from .transforms import padded, pixel_masks_of

logger = logging.getLogger(__name__)

_BATCH = 32


class FeatureStore:
    """Maps of V views, each padded at the right and below to a square, in half precision."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.maps = [np.load(file, mmap_mode="r") for file in sorted(folder.glob("level*.npy"))]
        facts = torch.load(folder / "views.pt", weights_only=True)
        self.boxes, self.kept = facts["boxes"], facts["kept"]
        self.sizes: list[tuple[int, int]] = [tuple(size) for size in facts["sizes"]]
        """(height, width) of each view without padding."""
        self.side: int = facts["side"]

    def __len__(self) -> int:
        return len(self.sizes)

    def batch(self, indices: Sequence[int]) -> list[Tensor]:
        """The N maps [B, C, h, w] of some views, float32."""
        return [torch.from_numpy(level[list(indices)].astype(np.float32)) for level in self.maps]

    def pixel_masks(self, indices: Sequence[int]) -> Tensor | None:
        """[B, S, S] int64, 1 on the pictures; None where nothing is padded."""
        sizes = [self.sizes[index] for index in indices]
        if all(size == (self.side, self.side) for size in sizes):
            return None
        return pixel_masks_of(sizes, self.side, self.side)

    @classmethod
    def of(
        cls,
        folder: Path,
        model: DynamicDinoForObjectDetection,
        views: Sequence[View],
        side: int,
        made_of: dict[str, Any],
    ) -> "FeatureStore":
        """The store of ``views`` in ``folder``, made by the model's backbone unless it is there already.

        ``side``: pixels of the square. ``made_of``: everything that decides the views, for the store's name.
        """
        key = hashlib.sha256(json.dumps([made_of, side, fingerprint(model)], sort_keys=True).encode())
        place = folder / key.hexdigest()[:24]
        if not (place / "views.pt").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{place}.lock"):  # the ranks of a run come here together
                if not (place / "views.pt").is_file():
                    with atomic_folder(place) as temporary:
                        _fill(temporary, model, views, side)
        return cls(place)


def fingerprint(model: DynamicDinoForObjectDetection) -> str:
    """Changes when the backbone's weights or its input's normalisation do."""
    digest = hashlib.sha256(json.dumps([model.config.image_mean, model.config.image_std]).encode())
    for name, tensor in sorted(model.backbone.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def pictures_key(samples: Sequence[DetectionSample]) -> list[Any]:
    """Changes when a picture file does."""
    stats = [(str(sample.path), sample.path.stat()) for sample in samples]
    return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]


@torch.no_grad()
def _fill(folder: Path, model: DynamicDinoForObjectDetection, views: Sequence[View], side: int) -> None:
    logger.info("computing the backbone's maps of %d pictures, once", len(views))
    training, began, said = model.training, time.monotonic(), time.monotonic()
    model.eval()
    stores: list[np.memmap] = []
    boxes, kept, sizes = [], [], []
    for start, batch in _batches(views):
        pixels_B3SS = torch.stack([padded(view.pixels, side, side) for view in batch])
        for level, features in enumerate(model.encode_image(pixels_B3SS.to(model.device))):
            if start == 0:
                shape = (len(views), *features.shape[1:])
                file = folder / f"level{level}.npy"
                stores.append(np.lib.format.open_memmap(file, "w+", np.float16, shape))
            stores[level][start : start + len(batch)] = features.half().cpu().numpy()
        boxes += [view.boxes_K4 for view in batch]
        kept += [view.kept_K for view in batch]
        sizes += [list(view.pixels.shape[1:]) for view in batch]
        done = start + len(batch)
        if time.monotonic() - said > 10:
            said = time.monotonic()
            left = (said - began) / done * (len(views) - done)
            logger.info("%d of %d pictures, %.0f s left", done, len(views), left)
    for store in stores:
        store.flush()
    torch.save({"boxes": boxes, "kept": kept, "sizes": sizes, "side": side}, folder / "views.pt")
    model.train(training)


def _batches(views: Sequence[View]) -> Iterator[tuple[int, list[View]]]:
    for start in range(0, len(views), _BATCH):
        yield start, [views[i] for i in range(start, min(start + _BATCH, len(views)))]
