"""Maps of a frozen backbone, computed once and read from disk in every step.

Shapes: V views, N levels, S the side of a view in pixels, C channels, h x w cells of a level.
"""

import io
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from unimoe.data.feature_cache import FeatureStore
from unimoe.detection.model.modeling import DynamicDinoForObjectDetection
from unimoe.files import atomic_write, fingerprint

from .annotations import DetectionSample
from .dataset import View
from .transforms import padded, pixel_masks_of

logger = logging.getLogger(__name__)

_BATCH = 32
_FACTS = "views.pt"  # written last: the store is complete


class ViewStore:
    """Maps of V views, each padded at the right and below to a square, in half precision."""

    def __init__(self, folder: Path):
        self.maps = FeatureStore(folder, torch.float16)
        """Index of a view -> its N maps [C, h, w]."""
        facts = torch.load(folder / _FACTS, weights_only=True)
        self.boxes, self.kept = facts["boxes"], facts["kept"]
        self.sizes: list[tuple[int, int]] = [tuple(size) for size in facts["sizes"]]
        """(height, width) of each view without padding."""
        self.side: int = facts["side"]

    def __len__(self) -> int:
        return len(self.sizes)

    def batch(self, indices: Sequence[int]) -> list[Tensor]:
        """The N maps [B, C, h, w] of some views, float32."""
        rows = [self.maps.read(str(index)) for index in indices]
        return [torch.stack(level) for level in zip(*rows, strict=True)]

    def pixel_masks(self, indices: Sequence[int]) -> Tensor | None:
        """[B, S, S] int64, 1 on the images; None where nothing is padded."""
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
    ) -> "ViewStore":
        """The store of ``views`` in ``folder``, computed by the model's backbone unless it is there already.

        Args:
            folder: holds a store for each set of views.
            model: whose backbone sees the views.
            views: what the maps are computed of.
            side: of the square that views are padded to, in pixels.
            made_of: everything that decides the views, for the store's name.
        """
        description = [made_of, side, backbone_fingerprint(model), "safetensors"]
        place = folder / fingerprint(json.dumps(description, sort_keys=True))[:24]
        if not (place / _FACTS).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{place}.lock"):  # the ranks of a run come here together
                if not (place / _FACTS).is_file():
                    _fill(place, model, views, side)
        return cls(place)


def backbone_fingerprint(model: DynamicDinoForObjectDetection) -> str:
    """Identifies the backbone's weights and the normalization of its input."""
    weights = sorted(model.backbone.state_dict().items())
    normalization = json.dumps([model.config.image_mean, model.config.image_std])
    return fingerprint(normalization, *(item for pair in weights for item in pair))


def images_key(samples: Sequence[DetectionSample]) -> list[Any]:
    """What identifies the image files: it changes when one of them does."""
    stats = [(str(sample.path), sample.path.stat()) for sample in samples]
    return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]


@torch.no_grad()
def _fill(folder: Path, model: DynamicDinoForObjectDetection, views: Sequence[View], side: int) -> None:
    logger.info("computing the backbone's feature maps of %d images, once", len(views))
    training, began, said = model.training, time.monotonic(), time.monotonic()
    model.eval()
    store = FeatureStore(folder, torch.float16)
    boxes, kept, sizes = [], [], []
    for start, batch in _batches(views):
        keys = [str(index) for index in range(start, start + len(batch))]
        if not all(key in store for key in keys):  # else an interrupted call has stored them
            pixels_B3SS = torch.stack([padded(view.pixels, side, side) for view in batch])
            levels = [level.half().cpu() for level in model.encode_image(pixels_B3SS.to(model.device))]
            store.add({key: [level[row] for level in levels] for row, key in enumerate(keys)})
        boxes += [view.boxes_K4 for view in batch]
        kept += [view.kept_K for view in batch]
        sizes += [list(view.pixels.shape[1:]) for view in batch]
        done = start + len(batch)
        if time.monotonic() - said > 10:
            said = time.monotonic()
            left = (said - began) / done * (len(views) - done)
            logger.info("%d of %d images, %.0f s left", done, len(views), left)
    facts = io.BytesIO()
    torch.save({"boxes": boxes, "kept": kept, "sizes": sizes, "side": side}, facts)
    atomic_write(folder / _FACTS, facts.getvalue())
    model.train(training)


def _batches(views: Sequence[View]) -> Iterator[tuple[int, list[View]]]:
    for start in range(0, len(views), _BATCH):
        yield start, [views[i] for i in range(start, min(start + _BATCH, len(views)))]
