"""Annotated images, whatever file they came from.

Shapes: M objects of an image.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unimoe.data.errors import Fault
from unimoe.detection.model.prompt import clean_name
from unimoe.errors import UserError
from unimoe.media.image import load_image

_ORIENTATION = 0x0112  # EXIF


@dataclass(frozen=True)
class Category:
    """A class of objects."""

    id: int
    """As in the file; ids may have gaps."""
    name: str
    frequency: str | None = None
    """LVIS: ``r``, ``c`` or ``f`` (rare, common, frequent)."""


FAULTS = {
    "malformed": "an entry cannot be read",
    "duplicate image id": "two images have one id",
    "duplicate category id": "two categories have one id",
    "unknown image": "an annotation names an image that is not listed",
    "unknown category": "an annotation names a category that is not listed",
    "missing image": "a picture is not there",
    "duplicate annotation id": "two annotations have one id",
    "outside": "a box reaches out of its image",
    "empty box": "a box has no area inside its image",
    "empty name": "a category has no name",
    "size": "a picture has another size than the file says",
    "unreadable image": "a picture cannot be decoded",
}
REPAIRED = ("duplicate annotation id", "outside", "empty box")
"""Faults that reading repairs: boxes are clipped, those without area left out."""


@dataclass(frozen=True)
class DetectionSample:
    """One image with its objects, not yet decoded."""

    path: Path
    image_id: int
    source: str
    """The file and the entry it was read from; errors about the sample begin with it."""
    boxes_M4: Tensor
    """float32, (x1, y1, x2, y2) in pixels."""
    category_M: Tensor
    """int64, row of the set's categories; with a caption: row of ``spans``."""
    crowd_M: Tensor
    """bool, whether the box holds a group; such boxes are not trained on."""
    size: tuple[int, int] | None = None
    """(width, height) as the file says."""
    negatives: tuple[int, ...] | None = None
    """Rows of the categories that are known to be absent; None if all that have no box are."""
    caption: str | None = None
    """Grounding data: the sentence."""
    spans: tuple[tuple[tuple[int, int], ...], ...] = ()
    """Grounding data: the characters (start, end) of each phrase."""

    def load(self) -> Image.Image:
        """The picture, RGB, as the boxes mean it.

        It is turned upright by EXIF, unless the file gives the size of the picture before turning. Raises
        UserError when it cannot be decoded.
        """
        part = {"type": "image", "path": str(self.path)}
        picture = load_image(part, self.source)
        if self.size and picture.size != self.size == picture.size[::-1]:
            with Image.open(self.path) as raw:
                raw.getexif()[_ORIENTATION] = 1
                picture = load_image({**part, "image": raw}, self.source)
        return picture


@dataclass
class DetectionSet:
    """The images of one file."""

    path: Path
    samples: list[DetectionSample] = field(default_factory=list)
    categories: list[Category] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [category.name for category in self.categories]

    def fault(self, kind: str, where: str, message: str) -> None:
        """Note something wrong at an entry of the file."""
        self.faults.append(Fault(kind, f"{self.path}: {where}", message))

    def add(
        self,
        picture: Path,
        image_id: int,
        where: str,
        boxes: Sequence[Sequence[float]],
        rows: Sequence[int],
        crowd: Sequence[bool] | None = None,
        size: tuple[int, int] | None = None,
        **facts: Any,
    ) -> None:
        """Append a sample of (x1, y1, x2, y2) boxes: clipped to the image, without those of no area there."""
        boxes_M4 = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
        inside_M4, limits = boxes_M4, ""
        if size:
            inside_M4 = boxes_M4.clamp(min=0).minimum(torch.tensor([*size, *size], dtype=torch.float64))
            limits = f", expected one inside {size[0]} x {size[1]} pixels"
        keep_M = (inside_M4[:, 2:] > inside_M4[:, :2]).all(dim=1)
        moved_M = (boxes_M4 - inside_M4).abs().sum(dim=1) > 0.5  # less is the rounding of annotation tools
        for kind, wrong_M in (("outside", keep_M & moved_M), ("empty box", ~keep_M)):
            for m in wrong_M.nonzero()[:, 0].tolist():
                box = [round(value, 2) for value in boxes_M4[m].tolist()]
                self.fault(kind, where, f"{FAULTS[kind]}: found (x1, y1, x2, y2) = {box}{limits}")
        self.samples.append(
            DetectionSample(
                path=picture,
                image_id=image_id,
                source=f"{self.path}: {where}",
                boxes_M4=inside_M4[keep_M].float(),
                category_M=torch.tensor(rows, dtype=torch.int64)[keep_M],
                crowd_M=torch.tensor(crowd or [False] * len(rows))[keep_M].bool(),
                size=size,
                **facts,
            )
        )

    @contextmanager
    def entry(self, where: str) -> Iterator[None]:
        """What is wrong with the shape of an entry becomes a fault."""
        try:
            yield
        except (KeyError, TypeError, ValueError, IndexError) as error:
            what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            self.fault("malformed", where, what)

    def rows_by_id(self) -> dict[int, int]:
        """Category id -> its row; faults for ids that are used twice and names that are empty."""
        row_of: dict[int, int] = {}
        for row, category in enumerate(self.categories):
            where = f"category {category.id}"
            if category.id in row_of:
                other = self.categories[row_of[category.id]].name
                self.fault("duplicate category id", where, f"{category.name!r} has the id of {other!r}")
            if not clean_name(category.name):
                self.fault("empty name", where, f"found the name {category.name!r}, expected words")
            row_of[category.id] = row
        return row_of

    def find(self, name: str, images: Path | None, where: str) -> Path:
        """Where a picture lies: in ``images``, or else near the file; a fault if nowhere."""
        near = [self.path.parent, self.path.parent / "images", self.path.parent.parent]
        roots = [images] if images else near
        for root in roots:
            if (root / name).is_file():
                return root / name
        self.fault("missing image", where, f"no picture {roots[0] / name}; is the folder of images right?")
        return roots[0] / name

    def ground_truth(self) -> dict[str, Any]:
        """The COCO dictionary to evaluate against: the file's own if it is one, else made of the samples.

        Raises UserError for captions, which have no fixed list of classes.
        """
        if self.path.suffix == ".json":
            return json.loads(self.path.read_text(encoding="utf-8-sig"))
        if any(sample.caption is not None for sample in self.samples):
            raise UserError(f"{self.path}: phrases of captions cannot be evaluated as classes")
        annotations = []
        for sample in self.samples:
            for box, row, crowd in zip(
                sample.boxes_M4.tolist(), sample.category_M.tolist(), sample.crowd_M.tolist(), strict=True
            ):
                width, height = box[2] - box[0], box[3] - box[1]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": sample.image_id,
                        "category_id": self.categories[row].id,
                        "bbox": [box[0], box[1], width, height],
                        "area": width * height,
                        "iscrowd": int(crowd),
                    }
                )
        return {
            "images": [{"id": sample.image_id, "file_name": str(sample.path)} for sample in self.samples],
            "annotations": annotations,
            "categories": [{"id": c.id, "name": c.name} for c in self.categories],
        }
