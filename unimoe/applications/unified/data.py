"""Images with classes: emoji of the prepared artists, or a folder with a folder for each class."""

from pathlib import Path

import numpy as np
from PIL import Image

from unimoe.applications.labelled_images import CLASSES, LabelledImages, draw_sprites
from unimoe.applications.pictures import IMAGE_TYPES, read_image, scaled_pixels
from unimoe.errors import UserError
from unimoe.prepare import default_part
from unimoe.synthetic.sprites import open_artist
from unimoe.training.application import ApplicationData, split_of


class UnifiedData(ApplicationData):
    """Images and classes, split into training, validation and test."""

    def __init__(
        self,
        train: str = "sprites",
        side: int = 32,
        steps: int = 1000,
        batch_size: int = 32,
        seed: int = 0,
    ):
        """
        Args:
            train: ``sprites``, the emoji of the prepared artists in ten classes; or a folder with one folder
                of images for each class.
            side: height and width of the images; those of a folder are resized.
            steps: optimizer steps; the data is repeated as often as that takes.
            batch_size: images of a batch on each device.
            seed: seed of the order of the images.

        Raises:
            UserError: a number is below 1.
        """
        super().__init__(steps, batch_size, seed)
        if side < 1:
            raise UserError(f"data.side is {side}, expected at least 1")
        self.train, self.side = train, side
        self.classes: list[str] = []
        """Names of the labels, after ``setup``."""

    def files(self) -> list[str]:
        """None: parts have versions, and a folder's images are read as they are."""
        return []

    def setup(self, stage: str) -> None:
        """Draw the sprites or read the folder.

        Raises:
            UserError: the folder or an image is missing or bad, or a class or a split is empty.
        """
        if self.sets:
            return
        if self.train == "sprites":
            artists = [open_artist(default_part(name)) for name in ("sprites", "artist")]
            self.classes = list(CLASSES)
            self.sets = {**draw_sprites(artists, self.side)}
        else:
            self.classes, sets = read_classes(Path(self.train), self.side)
            self.sets = {**sets}


def read_classes(folder: Path, side: int) -> tuple[list[str], dict[str, LabelledImages]]:
    """Names of the classes, and the images of each split.

    Raises:
        UserError: there are fewer than two classes, an image cannot be read, or a class or a split is empty.
    """
    folders = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if len(folders) < 2:
        raise UserError(
            f"{folder} holds {len(folders)} folders, expected one for each of at least two classes"
        )
    files = [
        (path, label)
        for label, one in enumerate(folders)
        for path in sorted(one.iterdir())
        if path.suffix.lower() in IMAGE_TYPES
    ]
    sets = {}
    for split in ("train", "val", "test"):
        chosen = [pair for pair in files if split_of(_name(pair[0], folder)) == split]
        if not chosen:
            raise UserError(f"{folder}: the {split} split of {len(files)} images is empty")
        labels = np.array([label for _, label in chosen])
        if split == "train" and len(missing := set(range(len(folders))) - set(labels.tolist())):
            raise UserError(f"{folders[min(missing)]} has no image in the train split; add some or remove it")
        sets[split] = LabelledImages(np.stack([_read(path, side) for path, _ in chosen]), labels)
    return [one.name for one in folders], sets


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _read(path: Path, side: int) -> np.ndarray:
    """[3, S, S] float32 in -1..1."""
    return scaled_pixels(read_image(path, "RGB").resize((side, side), Image.Resampling.BOX))
