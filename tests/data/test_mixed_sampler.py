from collections import Counter

import pytest

from unimoe.data.mixed_sampler import MixedBatchSampler
from unimoe.errors import UserError


def test_every_batch_has_the_mix():
    for batch in MixedBatchSampler([10, 3], [4, 2], steps=20):
        assert Counter(index >= 10 for index in batch) == {False: 4, True: 2}


def test_samples_are_used_equally():
    used = Counter(index for batch in MixedBatchSampler([10, 3], [5, 3], steps=4) for index in batch)
    assert used == {**dict.fromkeys(range(10), 2), **dict.fromkeys(range(10, 13), 4)}


def test_resumed_order_is_the_same():
    whole = list(MixedBatchSampler([10, 3], [4, 2], steps=20, seed=5))
    resumed = MixedBatchSampler([10, 3], [4, 2], steps=20, seed=5)
    resumed.load_state_dict(MixedBatchSampler([10, 3], [4, 2], steps=20, seed=5).state_dict(consumed=7))
    assert list(resumed) == whole[7:]
    assert list(MixedBatchSampler([10, 3], [4, 2], steps=20, seed=6)) != whole
    with pytest.raises(UserError, match=r"mix was \[4, 2\], now it is \[4, 1\]"):
        MixedBatchSampler([10, 3], [4, 1], steps=20, seed=5).load_state_dict(resumed.state_dict(7))


def test_ranks_share_the_work():
    ranks = [MixedBatchSampler([8], [2], steps=2, world_size=2, rank=rank) for rank in (0, 1)]
    assert sorted(index for rank in ranks for batch in rank for index in batch) == list(range(8))


def test_empty_shares():
    with pytest.raises(UserError, match="at least one sample of each"):
        MixedBatchSampler([8, 2], [2, 0], steps=2)
