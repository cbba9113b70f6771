"""The simple readers on made-up features."""

import pytest
import torch

from unimoe.applications.diffusion.text import embed_texts
from unimoe.data import FeatureCache, Sample
from unimoe.demo.baselines import fit_probe, measure_baselines, measure_probes, pooled, region
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


class Grids(Features):
    """Features of two things side by side, or of some quarters: a path is the label in each quarter."""

    def get(self, key):
        generator = torch.Generator().manual_seed(sum(ord(c) << i for i, c in enumerate(key)))
        quarters_22D = torch.zeros(2, 2, 8)
        for index, label in enumerate(key[:4]):
            if label != "-":
                quarters_22D.view(4, 8)[index, int(label)] = 3.0
        grid_44D = quarters_22D.repeat_interleave(2, 0).repeat_interleave(2, 1)
        return [(grid_44D + 0.1 * torch.randn(4, 4, 8, generator=generator)).flatten(0, 1)]

    def key(self, part, where):
        return part["path"]


def about(kind, quarters, answer, number=0, asked="What?"):
    parts = [{"type": "image", "path": f"{quarters}{number}"}, {"type": "text", "text": asked}]
    facts = {"kind": kind, "question": asked}
    return Question(Sample([{"role": "user", "content": parts}], "x:0"), answer, facts)


def test_probes_read_positions_counts_and_yes_or_no():
    def pairs(number):
        for left in range(4):
            right = (left + 1 + number % 3) % 4
            quarters = f"{left}{right}" * 2
            yield about("left", quarters, f"A {NAMES[left]}.", number)
            yield about("right", quarters, f"A {NAMES[right]}.", number)

    def counts(number):
        for count, word in ((1, "One."), (4, "Four.")):
            quarters = (str(number % 4) * count).ljust(4, "-")
            yield about("count", quarters[number % 4 :] + quarters[: number % 4], word, number)

    names = [about("name", str(label) * 4, f"A {NAMES[label]}.", n) for label in range(4) for n in range(8)]
    train = [*names, *(q for n in range(24) for q in (*pairs(n), *counts(n)))]
    yes_no = [
        about("yes_no", "0000", "Yes.", 1, "Is this a dog?"),
        about("yes_no", "0000", "No.", 2, "Is this an owl?"),
    ]
    test = [*pairs(99), *counts(98), about("name", "2222", "A hot dog.", 9), *yes_no]
    wanted = dict.fromkeys(("left", "right", "count", "name", "yes_no"), 1.0)
    assert measure_probes(train, test, Grids()) == wanted


def test_regions_leave_out_the_middle_column_of_an_odd_grid():
    columns_9D = torch.tensor([1.0, 5.0, 2.0]).repeat(3)[:, None]
    assert [region(columns_9D, kind).item() for kind in ("left", "right")] == [1.0, 2.0]
    assert region(columns_9D, "count").shape == (4,)
    assert region(columns_9D, "colour").item() == pytest.approx(8 / 3)


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


def test_a_kind_without_training_questions_has_no_probe():
    assert measure_probes([question(0, 1)], [question(0, 1, kind="colour")], Features()) == {}
