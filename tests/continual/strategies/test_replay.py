import pytest

from unimoe.continual.strategies.replay import Replay
from unimoe.errors import UserError


def test_the_buffer_is_shared_evenly(attach, tasks):
    strategy = attach(Replay(buffer=6, share=0.5))
    assert strategy.replay_samples(tasks[0], 3) == ([], 0)
    sizes = []
    for task in tasks:
        strategy.after_training_exp(task)
        sizes.append([len(records) for records in strategy.memory["buffer"].values()])
    assert sizes == [[6], [3, 3], [2, 2, 2]]
    kept, joined = strategy.replay_samples(tasks[0], 4)
    assert joined == 2 and len(kept) == 6
    assert {sample.source for sample in kept} <= {s.source for task in tasks for s in task.samples}
    assert strategy.replay_samples(tasks[0], 1)[1] == 1  # never none


def test_the_kept_samples_are_a_matter_of_the_seed(attach, tasks):
    kept = []
    for seed in (0, 0, 1):
        strategy = attach(Replay(buffer=3))
        strategy.seed = seed
        strategy.after_training_exp(tasks[0])
        kept.append([sample.source for sample in strategy.replay_samples(tasks[1], 3)[0]])
    assert kept[0] == kept[1] != kept[2]


def test_settings():
    with pytest.raises(UserError, match="buffer and share above 0"):
        Replay(buffer=0)
