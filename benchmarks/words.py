"""How much names tell about pictures: zero-shot recognition of things whose names were never trained.

    make bench ARGS="words"
    make bench ARGS="words --names 50 731 --views 6 --json words.json"

The ceiling of open-vocabulary detection with the demo's frozen parts, without a detector: crops of emoji on
photographs, features of EfficientNet-Lite0 averaged over the crop, and a linear map that says what a thing
with a given MiniLM embedding looks like. It is fitted to N names and must choose among those of held-out
things, drawn by the artist of the training crops and by another one.

Shapes: K crops, C channels of the backbone, N trained names, M asked names, W width of the text encoder.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from unimoe.detection.model.build import load_backbone
from unimoe.prepare.cache import default_part
from unimoe.synthetic.concepts import HELD_OUT, Concept
from unimoe.synthetic.detection_scenes import MOST_SEEN, MOST_UNSEEN, seen_concepts, unseen_concepts
from unimoe.synthetic.sprites import Artist, background, load_photos, open_artist, split_photos, vary

SIZE, SIDE = 96, 80
"""Pixels of a crop, and of the longest side of the emoji in it."""


@torch.no_grad()
def text_embeddings(names: Sequence[str]) -> Tensor:
    """[N, W] sentence embeddings, normalised: the mean over the tokens."""
    folder = str(default_part("text"))
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(list(names), padding=True, return_tensors="pt")
    mask_NL1 = batch["attention_mask"][..., None]
    out_NLW = model(**batch).last_hidden_state
    return F.normalize((out_NLW * mask_NL1).sum(1) / mask_NL1.sum(1), dim=-1)


def crops(
    concept: Concept, artist: Artist, photos: dict[str, Image.Image], views: int, train: bool
) -> Tensor:
    """[views, 3, SIZE, SIZE] in 0..1: an emoji in the middle of random parts of photos."""
    images = []
    for view in range(views):
        rng = random.Random(f"{'train' if train else 'test'}:{concept.char}:{view}")
        image = background(photos[rng.choice(list(photos))], rng, SIZE, train)
        sprite = artist.sprite(concept.char)
        assert sprite is not None, concept
        sprite = vary(sprite, rng, SIDE, train and rng.random() < 0.5)
        image.paste(sprite, ((SIZE - sprite.width) // 2, (SIZE - sprite.height) // 2), sprite)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
    return torch.stack(images)


@torch.no_grad()
def crop_features(concepts: Sequence[Concept], artist: Artist, views: int, train: bool) -> Tensor:
    """[N * views, C]: the backbone's maps of three strides, averaged over the crop."""
    backbone, settings = load_backbone("default")
    backbone.eval()
    mean, std = (torch.tensor(settings[f"image_{name}"])[:, None, None] for name in ("mean", "std"))
    photos = split_photos(load_photos(default_part("photos")))[0 if train else 1]
    features = []
    for concept in concepts:
        maps = backbone((crops(concept, artist, photos, views, train) - mean) / std)
        features.append(torch.cat([one.mean((2, 3)) for one in maps], dim=1))
    return torch.cat(features)


def visual_prototypes(mean_NC: Tensor, text_NW: Tensor, asked_MW: Tensor, ridge: float = 10.0) -> Tensor:
    """[M, C]: what things with the asked names should look like, by ridge regression of the mean features of
    trained names on their text embeddings."""
    centre_W = text_NW.mean(0)
    text_NW, asked_MW = text_NW - centre_W, asked_MW - centre_W
    kernel_NN = text_NW @ text_NW.T + ridge * torch.eye(len(text_NW))
    return asked_MW @ text_NW.T @ torch.linalg.solve(kernel_NN, mean_NC)


def accuracy(x_KC: Tensor, prototype_MC: Tensor, views: int) -> float:
    """Share of crops, ``views`` of each name in turn, to which the prototype of their name is the nearest."""
    label_K = torch.arange(len(prototype_MC)).repeat_interleave(views)
    nearest_K = (F.normalize(x_KC, dim=-1) @ F.normalize(prototype_MC, dim=-1).T).argmax(1)
    return (nearest_K == label_K).float().mean().item()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--names", nargs="+", type=int, default=[50, 200, 600, MOST_SEEN], help="trained names"
    )
    parser.add_argument(
        "--unseen", nargs="+", type=int, default=[len(HELD_OUT), MOST_UNSEEN], help="names never trained"
    )
    parser.add_argument("--views", type=int, default=3, help="crops of each thing")
    parser.add_argument("--json", help="write the results to this file")
    found = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seen, unseen = seen_concepts(MOST_SEEN), unseen_concepts()
    artists = {"same artist": open_artist(default_part("sprites"))}
    artists["another artist"] = open_artist(default_part("artist"))
    text_NW = text_embeddings([concept.name for concept in (*seen, *unseen)])
    train_KC = crop_features(seen, artists["same artist"], found.views, train=True)
    mean_C, std_C = train_KC.mean(0), train_KC.std(0)
    mean_NC = ((train_KC - mean_C) / std_C).unflatten(0, (-1, found.views)).mean(1)
    tests = {
        name: (crop_features(unseen, one, found.views, train=False) - mean_C) / std_C
        for name, one in artists.items()
    }
    row_of = {concept: row for row, concept in enumerate((*seen, *unseen))}
    rows: list[dict[str, Any]] = []
    for trained in found.names:
        chosen_N = [row_of[concept] for concept in seen_concepts(trained)]
        for asked in found.unseen:
            asked_M = [row_of[concept] for concept in unseen_concepts(asked)]
            prototype_MC = visual_prototypes(mean_NC[chosen_N], text_NW[chosen_N], text_NW[asked_M])
            for name, test_KC in tests.items():
                x_KC = test_KC.unflatten(0, (-1, found.views))[[row - len(seen) for row in asked_M]]
                score = accuracy(x_KC.flatten(0, 1), prototype_MC, found.views)
                rows.append({"trained": trained, "asked": asked, "test": name, "accuracy": score})
    table = Table("trained names", "names to choose from", "chance", *artists)
    for trained in found.names:
        for asked in found.unseen:
            cells = [one["accuracy"] for one in rows if (one["trained"], one["asked"]) == (trained, asked)]
            table.add_row(str(trained), str(asked), f"{1 / asked:.3f}", *(f"{cell:.3f}" for cell in cells))
    Console().print(table)
    if found.json:
        Path(found.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
