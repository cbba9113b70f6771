"""Images with classes from several domains: emoji by artists, or a folder as WILDS has them.

Shapes: B episodes or images, N images of an episode, S side.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unimoe.applications.labelled_images import CLASSES, draw_sprites
from unimoe.applications.pictures import read_image, scaled_pixels
from unimoe.applications.tables import read_columns
from unimoe.errors import UserError
from unimoe.prepare import default_part
from unimoe.synthetic.sprites import open_artist
from unimoe.training.application import ApplicationData

ARTISTS = {"openmoji": "sprites", "twemoji": "artist", "noto": "noto", "fluent": "fluent"}
"""Domain of sprites -> the prepared part."""
COLUMNS = {"image": "filename", "label": "y", "domain": "location_remapped", "split": "split"}
"""Columns of ``metadata.csv``, as iWildCam names them."""
EPISODES = 4096
"""Number of different episodes in training."""


class Episodes(NamedTuple):
    """B episodes, each of one domain."""

    index: Tensor  # type: ignore[override]  (tuple.index)
    """[B] their numbers."""
    images: Tensor
    """[B, N, 3, S, S] float in -1..1; the support comes first."""
    labels: Tensor
    """[B, N] int64 classes."""
    domains: Tensor
    """[B] int64 training domains."""


class Batch(NamedTuple):
    """B images of an evaluation."""

    index: Tensor  # type: ignore[override]  (tuple.index)
    """[B] their numbers in the split."""
    images: Tensor
    """[B, 3, S, S] float in -1..1."""
    labels: Tensor
    """[B] int64 classes."""
    domains: Tensor
    """[B] int64 domains of the split."""


@dataclass(frozen=True)
class Domain:
    """Images of one domain in one split."""

    name: str
    labels: np.ndarray
    """[images] int64 classes."""
    read: Callable[[list[int]], np.ndarray]
    """Places -> [..., 3, S, S] float32 in -1..1."""


class EpisodeSet:
    """Random images of one domain after another; an episode follows from its number. A domain with too few
    images repeats some."""

    def __init__(self, domains: list[Domain], size: int):
        self.domains, self.size = domains, size

    def __len__(self) -> int:
        return EPISODES

    def __getitems__(self, indices: list[int]) -> Episodes:
        images, labels = [], []
        for index in indices:
            domain, rng = self.domains[index % len(self.domains)], random.Random(index)
            every = range(len(domain.labels))
            enough = len(every) >= self.size
            places = rng.sample(every, self.size) if enough else rng.choices(every, k=self.size)
            images.append(domain.read(places))
            labels.append(domain.labels[places])
        return Episodes(
            torch.tensor(indices),
            torch.from_numpy(np.stack(images)),
            torch.from_numpy(np.stack(labels)),
            torch.tensor([index % len(self.domains) for index in indices]),
        )


class ShiftedSet:
    """Images of several domains, of which some, the support, are for adaptation and the others are
    evaluated."""

    def __init__(self, domains: list[Domain], support: int, known: list[str]):
        """
        Args:
            domains: the domains of the split.
            support: images for the adaptation to a domain, at most half of what it has.
            known: names of the training domains.
        """
        self.domains = domains
        self.trained = [known.index(one.name) if one.name in known else -1 for one in domains]
        """Place of each domain among the training domains; -1 for another one."""
        self.supports: list[list[int]] = []
        self.rows: list[tuple[int, int]] = []
        for number, domain in enumerate(domains):
            places = list(range(len(domain.labels)))
            random.Random(domain.name).shuffle(places)
            count = min(support, len(places) // 2)
            self.supports.append(places[:count])
            self.rows += [(number, place) for place in sorted(places[count:])]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> Batch:
        rows = [self.rows[index] for index in indices]
        images = np.stack([self.domains[domain].read([place])[0] for domain, place in rows])
        labels = [int(self.domains[domain].labels[place]) for domain, place in rows]
        domains = torch.tensor([domain for domain, _ in rows])
        return Batch(torch.tensor(indices), torch.from_numpy(images), torch.tensor(labels), domains)

    def support(self, domain: int) -> Tensor:
        """[images, 3, S, S] of the support of a domain."""
        return torch.from_numpy(self.domains[domain].read(self.supports[domain]))


class AdaptationData(ApplicationData):
    """Training domains in episodes, and domains to adapt to."""

    def __init__(
        self,
        train: str = "sprites",
        held_out: str | None = None,
        columns: dict[str, str] | None = None,
        images: str = "train",
        side: int = 32,
        support: int = 24,
        query: int = 24,
        steps: int = 600,
        batch_size: int = 3,
        seed: int = 0,
    ):
        """
        Args:
            train: ``sprites``, the emoji of four prepared artists, which are the domains; or a folder with
                ``metadata.csv``, a row for each image.
            held_out: artist of the test, for sprites: openmoji, twemoji, noto or fluent. By default they
                take turns: that of seed 0 is openmoji, of seed 1 twemoji.
            columns: column names of a folder's table by content, such as ``{domain: hospital}``. By default
                ``image: filename`` (the path below ``images``), ``label: y``, ``domain: location_remapped``
                and ``split: split``, as iWildCam has them; rows whose split is not train, val or test are
                left out.
            images: subfolder that holds a folder's images; ``.`` for the folder itself.
            side: height and width that sprites are drawn in, and images of a folder are resized to; a
                multiple of 8.
            support: unlabeled images of an episode, and for the adaptation to a domain.
            query: other images of an episode.
            steps: optimizer steps; the data is repeated as often as that takes.
            batch_size: episodes of a batch on each device.
            seed: seed of the order of the episodes.

        Raises:
            UserError: a number or an artist is out of range, or a setting has no effect.
        """
        super().__init__(steps, batch_size, seed)
        if side < 8 or side % 8:
            raise UserError(f"data.side is {side}, expected a multiple of 8")
        if min(support, query) < 1:
            raise UserError(f"data.support and data.query are {support} and {query}, expected at least 1")
        if held_out is not None and train != "sprites":
            raise UserError(
                f"data.held_out is {held_out}, which only sprites have; the column "
                "data.columns.split says which domains of a folder are held out"
            )
        if held_out is not None and held_out not in ARTISTS:
            raise UserError(f"data.held_out is {held_out!r}, expected one of {', '.join(ARTISTS)}")
        if unknown := [name for name in columns or {} if name not in COLUMNS]:
            raise UserError(f"data.columns names {unknown[0]!r}, expected one of {', '.join(COLUMNS)}")
        if train == "sprites" and columns:
            raise UserError("data.columns is given, but data.train is sprites, which have none")
        self.train, self.columns, self.images = train, COLUMNS | (columns or {}), images
        self.held_out = held_out or list(ARTISTS)[seed % len(ARTISTS)]
        self.side, self.support, self.query = side, support, query
        self.classes: list[str] = []
        """Names of the labels, after ``setup``."""
        self.domains: list[str] = []
        """Names of the training domains, after ``setup``."""

    def files(self) -> list[str]:
        """None: images are too many to be read for a hash, and parts have versions."""
        return []

    def setup(self, stage: str) -> None:
        """Draw the sprites or read ``metadata.csv``; the images of a folder are read when they are used.

        Raises:
            UserError: the folder or a column is missing, a split is empty, there are fewer than two training
                domains or classes, a class has no training image, or a domain to adapt to has one image.
        """
        if self.sets:
            return
        self.classes, splits = (
            self._sprites()
            if self.train == "sprites"
            else read_folder(Path(self.train), self.columns, self.images, self.side)
        )
        self.domains = [one.name for one in splits["train"]]
        self.sets["train"] = EpisodeSet(splits["train"], self.support + self.query)
        for split in ("val", "test"):
            self.sets[split] = ShiftedSet(splits[split], self.support, self.domains)

    def _sprites(self) -> tuple[list[str], dict[str, list[Domain]]]:
        """Three artists train, and are validated on other emoji; the fourth is for the test, with all."""
        known, new = {"train": ["train"], "val": ["val", "test"]}, {"test": ["train", "val", "test"]}
        splits: dict[str, list[Domain]] = {"train": [], "val": [], "test": []}
        for name, part in ARTISTS.items():
            drawn = draw_sprites([open_artist(default_part(part))], self.side)
            for split, parts in (new if name == self.held_out else known).items():
                images = np.concatenate([drawn[one].images for one in parts])
                labels = np.concatenate([drawn[one].labels for one in parts])
                splits[split].append(Domain(name, labels, images.__getitem__))
        return list(CLASSES), splits


def read_folder(
    folder: Path, names: dict[str, str], images: str, side: int
) -> tuple[list[str], dict[str, list[Domain]]]:
    """Names of the classes, and the domains of each split.

    Args:
        folder: holds ``metadata.csv``.
        names: column names, with the keys of ``COLUMNS``.
        images: its subfolder that holds the images.
        side: height and width that images are resized to.

    Raises:
        UserError: as :meth:`AdaptationData.setup` says.
    """
    table = folder / "metadata.csv"
    columns = read_columns([table], list(names.values()))
    image, label, domain, split = (columns[names[key]] for key in COLUMNS)
    of_split = np.array(split.values)[split.codes]
    trained = np.unique(label.codes[of_split == "train"]).tolist()
    classes = {code: place for place, code in enumerate(sorted(trained, key=lambda code: label.values[code]))}
    splits: dict[str, list[Domain]] = {}
    for name in ("train", "val", "test"):
        rows = np.flatnonzero(of_split == name)
        if not len(rows):
            raise UserError(f"{table}: no row has the {names['split']} {name}")
        if lost := sorted({label.values[code] for code in set(label.codes[rows].tolist()) - classes.keys()}):
            raise UserError(f"{table}: class {lost[0]} is in the {name} split, but has no training image")
        splits[name] = []
        for code in np.unique(domain.codes[rows]).tolist():
            own = rows[domain.codes[rows] == code]
            if len(own) < 2:
                raise UserError(
                    f"{table}: {names['domain']} {domain.values[code]} has one image in the {name} split, "
                    "expected two or more"
                )
            paths = [folder / images / image.values[one] for one in image.codes[own]]
            labels = np.array([classes[one] for one in label.codes[own].tolist()])
            splits[name].append(Domain(domain.values[code], labels, _reader(paths, side)))
    for what, found in ((names["domain"], len(splits["train"])), (names["label"], len(classes))):
        if found < 2:
            raise UserError(f"{table}: the train split has {found} {what}, expected two or more")
    return [label.values[code] for code in classes], splits


def _reader(paths: list[Path], side: int) -> Callable[[list[int]], np.ndarray]:
    def read(places: list[int]) -> np.ndarray:
        size = (side, side)
        found = [read_image(paths[one], "RGB").resize(size, Image.Resampling.BOX) for one in places]
        return np.stack([scaled_pixels(one) for one in found])

    return read
