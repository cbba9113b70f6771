"""Baselines: accuracy of simple classifiers on the same frozen image features.

    nearest_neighbour  the name of the most similar training image
    linear_pair        ridge regression from image features to the MiniLM embedding of the name, nearest name
    linear_probe       logistic regression over the names

``measure_probes`` does the last for every kind of question, so that one sees what the frozen encoder knows of
colours, counts and positions.

Shapes: n images, S encoder positions, D encoder width, C names, H width of the text encoder.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as nnf

from unimoe.applications.diffusion.text import embed_texts
from unimoe.data import FeatureCache
from unimoe.encoders.ridge import ridge_map
from unimoe.errors import UserError
from unimoe.synthetic.questions import normalise

from .evaluate import Question

PROBES = {
    ("group",): ("group",),
    ("colour",): ("colour",),
    ("count",): ("count",),
    ("name", "left", "right"): ("name", "left", "right", "yes_no"),
}
"""Kinds of training questions that a probe is fitted to, and the kinds that it answers."""


def measure_baselines(
    train: Sequence[Question],
    tests: Mapping[str, Sequence[Question]],
    features: FeatureCache,
    text_encoder: str | Path,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Exact-name accuracy of each baseline on each test set, ``{baseline: {set: accuracy}}``.

    Args:
        train: questions about one image; those that do not ask for its name are ignored.
        tests: questions of each test set.
        features: holds the features of every image.
        text_encoder: folder of a BERT-like sentence encoder.
        seed: seed of the logistic regression.

    The baselines choose among the names of the training images.

    Raises:
        UserError: no training question asks for a name, or features are missing.
    """
    named = [question for question in train if question.facts.get("kind") == "name"]
    if not named:
        raise UserError("the baselines need training questions of the kind 'name'")
    names = sorted({normalise(question.answer) for question in named})
    x_nD, labels_n = pooled(named, features), torch.tensor([names.index(normalise(q.answer)) for q in named])
    names_CH = embed_texts(names, text_encoder, batch=len(names))
    standardise = _standardiser(x_nD)
    z_nD = standardise(x_nD)
    weight_HD, bias_H = ridge_map(x_nD, names_CH[labels_n])
    mean_H = names_CH.mean(0)

    classifiers = {
        "nearest_neighbour": lambda x_mD: labels_n[_cosine(standardise(x_mD), z_nD).argmax(1)],
        "linear_pair": lambda x_mD: _cosine(
            (x_mD.double() @ weight_HD.T + bias_H).float() - mean_H, names_CH - mean_H
        ).argmax(1),
        "linear_probe": _probe(x_nD, labels_n, len(names), seed),
    }
    accuracy: dict[str, dict[str, float]] = {baseline: {} for baseline in classifiers}
    for name, questions in tests.items():
        x_mD = pooled(questions, features)
        for baseline, choose in classifiers.items():
            chosen = [names[index] for index in choose(x_mD).tolist()]
            right = sum(q.is_right(answer) for q, answer in zip(questions, chosen, strict=True))
            accuracy[baseline][name] = round(right / len(questions), 4)
    return accuracy


def measure_probes(
    train: Sequence[Question], test: Sequence[Question], features: FeatureCache, seed: int = 0
) -> dict[str, float]:
    """Accuracy of linear probes on each kind of question in ``test``, ``{kind: accuracy}``.

    Each probe is a logistic regression over answers, on the :func:`region` of the image that a question is
    about. ``name``, ``left`` and ``right`` share one; ``yes_no`` is yes where its name is the one asked for.
    A kind that no training question asks for is left out.

    Args:
        train: written questions about one image, of all kinds.
        test: questions about one image; ``facts`` hold the ``kind`` and, for ``yes_no``, the ``question``.
        features: holds the features of every image.
        seed: seed of the logistic regressions.

    Raises:
        UserError: features are missing.
    """
    found: dict[str, list[bool]] = {}
    for kinds, asks in PROBES.items():
        known = [q for q in train if q.facts.get("kind") in kinds]
        asked = [q for q in test if q.facts.get("kind") in asks]
        if not (known and asked):
            continue
        answers = sorted({normalise(q.answer) for q in known})
        labels_n = torch.tensor([answers.index(normalise(q.answer)) for q in known])
        x_nD, x_mD = pooled(known, features, by_kind=True), pooled(asked, features, by_kind=True)
        chosen_m = _probe(x_nD, labels_n, len(answers), seed)(x_mD)
        for q, index in zip(asked, chosen_m.tolist(), strict=True):
            kind, answer = q.facts["kind"], answers[index]
            if kind == "yes_no":
                answer = "yes" if answer == normalise(q.facts["question"].removeprefix("Is this ")) else "no"
            found.setdefault(kind, []).append(q.is_right(answer))
    return {kind: round(sum(right) / len(right), 4) for kind, right in found.items()}


def region(features_SD: Tensor, kind: str) -> Tensor:
    """Mean features of the part of an image that a kind of question is about.

    [D] of the left or right half, [4D] of the quarters side by side for a count, [D] of the whole image for
    other kinds. Halves and quarters are those of a square grid.
    """
    if kind not in ("left", "right", "count"):
        return features_SD.mean(0)
    side = math.isqrt(len(features_SD))
    grid_HWD = features_SD.unflatten(0, (side, side))
    if kind == "count":
        return nnf.adaptive_avg_pool2d(grid_HWD.movedim(2, 0), 2).flatten()
    half = max(1, side // 2)  # without the middle column of an odd grid
    return (grid_HWD[:, :half] if kind == "left" else grid_HWD[:, -half:]).mean((0, 1))


def pooled(questions: Sequence[Question], features: FeatureCache, by_kind: bool = False) -> Tensor:
    """[n, D] features of each question's image, averaged over all positions; ``by_kind`` takes the
    :func:`region` that the question is about instead."""
    rows = []
    for question in questions:
        images = [part for part in question.sample.media() if part["type"] == "image"]
        if len(images) != 1:
            raise UserError(f"{question.sample.source}: expected one image, found {len(images)}")
        stored = features.get(features.key(images[0], question.sample.source))
        if stored is None:
            raise UserError(f"{question.sample.source}: its image is not in {features.folder}")
        rows.append(region(stored[0], question.facts["kind"] if by_kind else ""))
    return torch.stack(rows)


def fit_probe(z_nD: Tensor, labels_n: Tensor, classes: int, seed: int, epochs: int = 60) -> torch.nn.Linear:
    """Logistic regression on standardised features: AdamW, batches of 64, cosine decay to zero."""
    generator = torch.Generator().manual_seed(seed)
    probe = torch.nn.Linear(z_nD.shape[1], classes)
    torch.nn.init.zeros_(probe.weight)
    torch.nn.init.zeros_(probe.bias)
    steps = epochs * -(-len(z_nD) // 64)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(z_nD), generator=generator).split(64):
            loss = nnf.cross_entropy(probe(z_nD[rows]), labels_n[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return probe


def _probe(x_nD: Tensor, labels_n: Tensor, classes: int, seed: int) -> Callable[[Tensor], Tensor]:
    """A function of features [m, D] that gives the classes [m] of a logistic regression."""
    standardise = _standardiser(x_nD)
    probe = fit_probe(standardise(x_nD), labels_n, classes, seed).requires_grad_(False)
    return lambda x_mD: probe(standardise(x_mD)).argmax(1)


def _standardiser(x_nD: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that subtracts the mean of ``x_nD`` and divides by its deviation."""
    mean_D, std_D = x_nD.mean(0), x_nD.std(0).clamp_min(1e-6)
    return lambda x_mD: (x_mD - mean_D) / std_D


def _cosine(a_nD: Tensor, b_mD: Tensor) -> Tensor:
    return nnf.normalize(a_nD) @ nnf.normalize(b_mD).T
