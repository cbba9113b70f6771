from collections import Counter

import numpy as np
import pytest

from unimoe.data import ModalityBatchSampler
from unimoe.errors import UserError

KINDS = ["image"] * 23 + ["text"] * 9 + ["speech"] * 4 + ["image+speech"] * 1


def kinds_of(batch):
    return {KINDS[index] for index in batch}


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_sample_once_and_like_with_like(shuffle):
    sampler = ModalityBatchSampler(KINDS, 4, seed=3, shuffle=shuffle)
    batches = list(sampler)
    assert sorted(index for batch in batches for index in batch) == list(range(37))
    assert all(len(kinds_of(batch)) == 1 and len(batch) <= 4 for batch in batches)
    assert len(batches) == len(sampler) == 6 + 3 + 1 + 1


def test_order_depends_on_seed_and_epoch_only():
    sampler = ModalityBatchSampler(KINDS, 4, seed=3)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    assert second != list(ModalityBatchSampler(KINDS, 4, seed=4))
    sampler.set_epoch(0)
    assert list(sampler) == first == list(ModalityBatchSampler(KINDS, 4, seed=3))
    changes = sum(kinds_of(a) != kinds_of(b) for a, b in zip(first, first[1:], strict=False))
    assert changes > 3  # kinds are interleaved, not one after the other


def test_without_shuffling_the_order_is_the_files():
    batches = ModalityBatchSampler(KINDS, 4, shuffle=False)
    assert [index for batch in batches for index in batch] == list(range(37))


@pytest.mark.parametrize("consumed", [0, 1, 5, 10, 11])
def test_resumes_in_the_middle_of_an_epoch(consumed):
    whole = ModalityBatchSampler(KINDS, 4, seed=3)
    whole.set_epoch(2)
    batches = list(whole)
    resumed = ModalityBatchSampler(KINDS, 4, seed=3)
    resumed.load_state_dict(whole.state_dict(consumed))
    resumed.set_epoch(2)  # what a trainer does at the start of the epoch it resumes
    assert list(resumed) == list(resumed) == batches[consumed:]
    assert len(resumed) == len(batches)
    resumed.set_epoch(3)
    assert len(list(resumed)) == len(batches)


def test_counts_what_it_hands_out():
    sampler = ModalityBatchSampler(KINDS, 4)
    iterator = iter(sampler)
    taken = [next(iterator) for _ in range(3)]
    state = sampler.state_dict()
    assert state["consumed"] == 3
    resumed = ModalityBatchSampler(KINDS, 4)
    resumed.load_state_dict(state)
    assert taken + list(resumed) == list(ModalityBatchSampler(KINDS, 4))


@pytest.mark.parametrize("consumed", [0, 7, 11, 25, 30])
def test_a_run_of_steps_goes_through_the_epochs_and_resumes(consumed):
    run = ModalityBatchSampler(KINDS, 4, seed=3, steps=30)
    batches = list(run)
    assert len(batches) == len(run) == 30
    epochs = ModalityBatchSampler(KINDS, 4, seed=3)
    expected = []
    for epoch in range(3):
        epochs.set_epoch(epoch)
        expected += list(epochs)
    assert batches == expected[:30]
    resumed = ModalityBatchSampler(KINDS, 4, seed=3, steps=30)
    resumed.load_state_dict(run.state_dict(consumed))
    resumed.set_epoch(0)
    assert list(resumed) == batches[consumed:]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("steps", [None, 20])
def test_ranks_agree_on_kind_and_about_on_size(world_size, steps):
    ranks = [
        list(ModalityBatchSampler(KINDS, 4, seed=3, world_size=world_size, rank=rank, steps=steps))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    for together in zip(*ranks, strict=True):
        sizes = [len(batch) for batch in together]
        assert min(sizes) > 0 and max(sizes) - min(sizes) <= 1
        if 36 not in sum(together, []):  # the one picture with speech cannot be on all ranks
            assert len(set().union(*map(kinds_of, together))) == 1
    if steps is None:
        assert sorted(index for batches in ranks for batch in batches for index in batch) == list(range(37))


def test_what_is_too_little_for_the_ranks_goes_together():
    kinds = ["a", "b", "c", "d"]
    ranks = [list(ModalityBatchSampler(kinds, 1, world_size=3, rank=rank)) for rank in range(3)]
    assert sorted(index for batches in ranks for (batch,) in [batches] for index in batch) == [0, 1, 2, 3]


def test_fewer_samples_than_ranks_are_repeated():
    for rank in range(4):
        (batch,) = ModalityBatchSampler(["text"], 2, world_size=4, rank=rank)
        assert batch == [0]


@pytest.mark.parametrize("world_size", [1, 2])
def test_ten_thousand_mixed_samples_each_once_an_epoch(world_size):
    random = np.random.default_rng(0)
    share = [0.4, 0.3, 0.2, 0.0995, 0.0005]
    kinds = random.choice(["text", "image", "speech", "image+speech", "video"], 10_000, p=share).tolist()
    for epoch in range(2):
        seen = []
        for rank in range(world_size):
            sampler = ModalityBatchSampler(kinds, 7, seed=1, world_size=world_size, rank=rank)
            sampler.set_epoch(epoch)
            seen += [index for batch in sampler for index in batch]
        assert sorted(seen) == list(range(10_000))


def test_weights_are_shares_and_use_a_source_evenly():
    kinds = ["image", "text"] * 50 + ["text"] * 900
    sampler = ModalityBatchSampler(kinds, 10, seed=3, sizes=[100, 900], weights=[3.0, 1.0])
    used: Counter = Counter()
    for epoch in range(4):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) and all(len({kinds[i] for i in batch}) == 1 for batch in batches)
        used.update(index for batch in batches for index in batch)
    assert sum(used[i] for i in range(100)) == 4 * 750
    assert {used[i] for i in range(100)} == {30}
    assert {used[i] for i in range(100, 1000)} <= {1, 2}


def test_weights_must_be_one_a_source():
    with pytest.raises(UserError, match="every source needs a weight above 0"):
        ModalityBatchSampler(KINDS, 4, sizes=[37], weights=[0.0])


def test_a_state_of_other_data_or_settings_is_refused():
    state = ModalityBatchSampler(KINDS, 4).state_dict(2)
    for kinds, batch_size, seed in ((KINDS[1:], 4, 0), (KINDS, 2, 0), (KINDS, 4, 1)):
        with pytest.raises(UserError, match="cannot resume in the same order"):
            ModalityBatchSampler(kinds, batch_size, seed).load_state_dict(state)


@pytest.mark.parametrize(
    ("kinds", "options", "message"),
    [
        ([], {}, "no samples"),
        (KINDS, {"batch_size": 0}, "at least 1"),
        (KINDS, {"steps": 0}, "at least 1"),
        (KINDS, {"world_size": 2, "rank": 2}, "rank 2 of 2"),
    ],
)
def test_senseless_settings(kinds, options, message):
    with pytest.raises(UserError, match=message):
        ModalityBatchSampler(kinds, **{"batch_size": 4, **options})
