"""The simple readers on made-up features."""

import pytest
import torch

from unimoe.applications.diffusion.text import embed_texts
from unimoe.data import FeatureCache, Sample
from unimoe.demo.baselines import fit_probe, measure_baselines, pooled
from unimoe.demo.evaluate import Question
from unimoe.errors import UserError

NAMES = ["dog", "cat", "hot dog", "owl"]


class Features(FeatureCache):
    """Stands in for the cache: a picture's path is its label and its number."""

    def __init__(self):
        pass

    def key(self, part, where):
        return part["path"]

    def get(self, key):
        label, number = map(int, key.split("-"))
        generator = torch.Generator().manual_seed(number)
        centre = torch.zeros(8)
        centre[label] = 3.0
        return [centre + 0.3 * torch.randn(9, 8, generator=generator)]


def question(label, number, kind="name", pictures=1):
    parts = [{"type": "image", "path": f"{label}-{number}"}] * pictures + [{"type": "text", "text": "What?"}]
    return Question(
        Sample([{"role": "user", "content": parts}], f"x:{number}"), f"A {NAMES[label]}.", {"kind": kind}
    )


def test_separable_names_are_read_by_all(tiny_parts):
    train = [question(label, number) for label in range(4) for number in range(12)]
    train += [question(0, 99, kind="count")]
    tests = {"new_backgrounds": [question(label, 50 + label) for label in range(4)]}
    baselines = measure_baselines(train, tests, Features(), tiny_parts / "text")
    assert baselines == {
        reader: {"new_backgrounds": 1.0} for reader in ("nearest_neighbour", "linear_pair", "linear_probe")
    }
    assert measure_baselines(train, tests, Features(), tiny_parts / "text") == baselines


def test_the_probe_starts_at_chance_and_learns():
    z_nD = torch.randn(400, 20)
    labels_n = (z_nD[:, 0] > 0).long()
    probe = fit_probe(z_nD, labels_n, 2, seed=0)
    assert (probe(z_nD).argmax(1) == labels_n).float().mean() > 0.9


def test_name_embeddings_do_not_depend_on_the_batch(tiny_parts):
    together = embed_texts(NAMES, tiny_parts / "text")
    assert together.shape == (4, 16)
    for name, row_H in zip(NAMES, together, strict=True):
        torch.testing.assert_close(embed_texts([name], tiny_parts / "text")[0], row_H, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_read_is_named():
    with pytest.raises(UserError, match="x:3: expected one image, found 2"):
        pooled([question(0, 3, pictures=2)], Features())
    with pytest.raises(UserError, match="of the kind 'name'"):
        measure_baselines([question(0, 1, kind="count")], {}, Features(), "unused")
