import pytest

from unimoe.continual.training import SharedSampler, TrainingConfig, task_seed
from unimoe.errors import UserError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 3, "devices": 2, "num_nodes": 2}, "cannot be divided among 4 processes"),
        ({"lr": 0.0}, "must be above 0"),
        ({"warmup": 1.5}, "warmup must be from 0 to 1"),
        ({"clip": 0.0}, "clip above 0"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message):
        TrainingConfig(**settings)


def test_ranks_divide_the_batches_of_one():
    alone = SharedSampler(1, 0, [10], [4], 3, seed=1)
    shares = [SharedSampler(3, rank, [10], [4], 3, seed=1) for rank in range(3)]
    for step in range(3):
        assert sorted(index for share in shares for index in share.batch(step)) == sorted(alone.batch(step))


def test_seeds_of_tasks_are_small_enough_for_torch():
    assert task_seed(3, 2) == 3 * 1009 + 2
    assert 0 <= task_seed(2**32 - 1, 99) < 2**32
    assert len({task_seed(seed, index) for seed in range(20) for index in range(50)}) == 1000
