"""Annotated images, whatever file they came from.

Shapes: M objects of an image.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unimoe.data.errors import Fault
from unimoe.detection.model.prompt import distinct_names
from unimoe.errors import UserError
from unimoe.media.image import load_image

from .values import Box, Id, parse_id

_ORIENTATION = 0x0112  # EXIF
_SIZE_TOLERANCE = 2
"""Pixels by which an image may differ from the size that its annotations were made at."""


@dataclass(frozen=True)
class Category:
    """A class of objects."""

    id: Id
    """Id as in the file; ids may have gaps."""
    name: str
    frequency: str | None = None
    """LVIS: ``r``, ``c`` or ``f`` (rare, common, frequent)."""


FAULTS = {
    "malformed": "an entry cannot be read",
    "value": "a value is not what its key means",
    "box format": "boxes are not in the format of the file",
    "duplicate image id": "two images have one id",
    "duplicate category id": "two categories have one id",
    "unknown image": "an annotation names an image that is not listed",
    "unknown category": "an annotation names a category that is not listed",
    "unknown phrase": "a phrase is not in its caption",
    "missing image": "an image is not there",
    "duplicate annotation id": "two annotations have one id",
    "outside": "a box reaches out of its image",
    "empty box": "a box has no area inside its image",
    "empty name": "a category has no name",
    "same name": "two categories have one name",
    "no categories": "the file lists no categories",
    "size": "an image has another size than the file says",
    "unreadable image": "an image cannot be decoded",
}
"""What can be wrong with a file of boxes."""
REPAIRED = ("value", "duplicate annotation id", "outside", "empty box", "unknown phrase")
"""Faults that reading repairs: boxes are clipped, those without area and regions without text left out."""


@dataclass(frozen=True)
class DetectionSample:
    """One image with its objects, not yet decoded."""

    path: Path
    image_id: Id
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
        """The image, RGB, in the pixels that the boxes count.

        It is turned upright by EXIF, unless the file gives the size of the image before turning.

        Raises:
            UserError: it cannot be decoded, or has another size than the file says, so that no box would be
                on its object.
        """
        image = self.decode()
        if self.size and not _near(image.size, self.size):
            raise UserError(f"{self.source}: {self.size_problem(image.size)}; correct the file")
        return image

    def decode(self) -> Image.Image:
        """Decode as :meth:`load` does, whatever size the image has."""
        part = {"type": "image", "path": str(self.path)}
        image = load_image(part, self.source)
        if self.size and image.size != self.size == image.size[::-1]:
            with Image.open(self.path) as raw:
                raw.getexif()[_ORIENTATION] = 1
                image = load_image({**part, "image": raw}, self.source)
        return image

    def check_size(self) -> None:
        """Compare the size in the file with the image's header; what cannot be opened is left to ``load``.

        Raises:
            UserError: they differ.
        """
        try:
            with Image.open(self.path) as image:
                (width, height), turned = image.size, image.getexif().get(_ORIENTATION, 1) > 4
        except Exception:  # noqa: BLE001  (Pillow's plugins raise nearly anything on broken files)
            return
        size = (width, height)
        if self.size and not (_near(size, self.size) or (turned and _near((height, width), self.size))):
            raise UserError(f"{self.source}: {self.size_problem(size)}; correct the file")

    def size_problem(self, size: tuple[int, int]) -> str:
        """What to say of an image of another (width, height)."""
        width, height = self.size or (0, 0)
        return f"found {size[0]} x {size[1]} pixels, the file says {width} x {height}"


@dataclass
class DetectionSet:
    """The images of one file."""

    path: Path
    samples: list[DetectionSample] = field(default_factory=list)
    categories: list[Category] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    annotated: bool = True
    """False for the images of a test set, whose annotations are not published."""
    boxes_read: int = 0
    """How many boxes the file has, with those that were left out."""

    @property
    def names(self) -> list[str]:
        return [category.name for category in self.categories]

    @property
    def boxes(self) -> int:
        """How many boxes can be used."""
        return sum(len(sample.boxes_M4) for sample in self.samples)

    def fault(self, kind: str, where: str, message: str) -> None:
        """Note something wrong at an entry of the file."""
        self.faults.append(Fault(kind, f"{self.path}: {where}", message))

    def add(
        self,
        image: Path,
        image_id: Id,
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
        self.boxes_read += len(boxes_M4)
        self.samples.append(
            DetectionSample(
                path=image,
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
        """Turn what is wrong with the shape of an entry into a fault."""
        try:
            yield
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            self.fault("malformed", where, what)

    def rows_by_id(self) -> dict[Id, int]:
        """Category id -> its row; faults for ids and names that are used twice, and for empty names."""
        row_of: dict[Id, int] = {}
        row_of_name: dict[str, int] = {}
        for row, (category, name) in enumerate(zip(self.categories, distinct_names(self.names), strict=True)):
            where, id = f"category {category.id}", parse_id(category.id)
            if id in row_of:
                other = self.categories[row_of[id]].name
                self.fault("duplicate category id", where, f"{category.name!r} has the id of {other!r}")
            elif not name:
                self.fault("empty name", where, f"found the name {category.name!r}, expected words")
            elif name in row_of_name:
                other = self.categories[row_of_name[name]]
                message = f"{category.name!r} is the same name as {other.name!r} of category {other.id}"
                self.fault("same name", where, f"{message}; merge the two, or rename one")
            row_of[id] = row
            row_of_name.setdefault(name, row)
        if not self.categories:
            self.fault(
                "no categories", "categories", "found an empty list, expected the classes of the boxes"
            )
        return row_of

    def find(self, name: str, images: Path | None, where: str) -> Path:
        """Path of an image: in ``images``, or else near the file; a fault if nowhere."""
        near = [self.path.parent, self.path.parent / "images", self.path.parent.parent]
        roots = [images] if images else near
        found = find_file(name, roots)
        if found is None:
            found = roots[0] / name
            self.fault("missing image", where, f"no image {found}; is the folder of images right?")
        return found

    def check_sizes(self, most: int = 1000) -> None:
        """Compare the sizes that the file gives with those of up to ``most`` images, spread over the set.

        Raises:
            UserError: one differs, so that the boxes would not be on their objects.
        """
        for sample in self.samples[:: max(1, len(self.samples) // most)]:
            sample.check_size()

    def ground_truth(self) -> dict[str, Any]:
        """The COCO dictionary to evaluate against: the file's own if it is one, else made of the samples.

        Raises:
            UserError: the file holds captions, which have no fixed list of classes.
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


def find_file(name: str, roots: Sequence[Path], folder: bool = False) -> Path | None:
    """A file (or folder) that an annotation file names, under one of ``roots``; None if it is under none.

    Names of another machine are understood: backslashes, a path that is absolute there, and "../train/images"
    where ``train/images`` lies beside the file (Roboflow).
    """
    exists = Path.is_dir if folder else Path.is_file
    for root in roots:
        if exists(root / name):
            return root / name
    parts = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part != "/"]
    if parts and parts[0].endswith(":"):  # a drive
        parts = parts[1:]
    kept = [part for part in parts if part != ".."]
    tails = [parts, kept]
    if name.startswith(("/", "\\")) or name[1:2] == ":":  # absolute: never a bare name, it could be any
        tails += [kept[start:] for start in range(1, len(kept) - 1)]
    for tail in tails:
        for root in roots:
            if tail and exists(root.joinpath(*tail)):
                return root.joinpath(*tail)
    return None


def check_box_format(boxes: Sequence[tuple[Box, tuple[int, int] | None]], corners: bool) -> str | None:
    """What to say where the boxes of a file are in another format than the file's; None where they may be
    right.

    Args:
        boxes: four numbers and the image's (width, height) for each box.
        corners: the format is (x1, y1, x2, y2), not (x, y, width, height).
    """
    known = [(*box, *(size or (np.nan, np.nan))) for box, size in boxes]
    table = np.array(known, dtype=np.float64).reshape(-1, 6)
    table = table[np.isfinite(table[:, :4]).all(axis=1)]
    if not len(table):
        return None
    expected = "(x1, y1, x2, y2)" if corners else "(x, y, width, height)"
    values = table[:, :4]
    ends = values[:, 2:] if corners else values[:, :2] + values[:, 2:]
    if (values >= 0).all() and (ends <= 1.001).all() and (values % 1 != 0).any():
        return f"all {len(table)} boxes lie between 0 and 1, expected {expected} in pixels"
    table = table[np.isfinite(table).all(axis=1)]
    first, second, sizes = table[:, :2], table[:, 2:4], table[:, 4:]
    if not len(table):
        return None
    if corners:
        fit_other = (first >= 0).all() and (first + second <= sizes + 1).all() and (second > 0).all()
        wrong = (second <= first).any(axis=1)
    else:
        fit_other = (second > first).all() and (second <= sizes + 1).all()
        inside = (np.minimum(first + second, sizes) - first.clip(0)).clip(0)
        wrong = inside.prod(axis=1) < 0.8 * second.prod(axis=1)
    if fit_other and wrong.mean() >= 0.5:
        other = "(x, y, width, height)" if corners else "(x1, y1, x2, y2)"
        return f"{int(wrong.sum())} of {len(table)} boxes look like {other}, expected {expected}"
    return None


def _near(size: tuple[int, int], other: tuple[int, int]) -> bool:
    return all(abs(a - b) <= _SIZE_TOLERANCE for a, b in zip(size, other, strict=True))
