import pytest

from unimoe.data import ModalityBatchSampler
from unimoe.errors import UserError
from unimoe.training.loader import ResumableLoader


def loader(seed: int = 0, workers: int = 0) -> ResumableLoader:
    sampler = ModalityBatchSampler(["text"] * 7, 2, seed=seed, steps=9)
    return ResumableLoader(range(7), batch_sampler=sampler, collate_fn=list, num_workers=workers)


def test_a_resumed_loader_continues_with_the_next_batch():
    whole = list(loader())
    assert len(whole) == 9
    first, again = loader(), loader()
    batches = iter(first)
    begun = [next(batches) for _ in range(4)]
    again.load_state_dict(first.state_dict())
    assert begun + list(again) == whole
    assert again.delivered == 9, "over both runs"


def test_prefetched_batches_are_not_delivered_ones():
    """Two processes are batches ahead of the training; these come again."""
    ahead, again = loader(workers=2), loader()
    batches = iter(ahead)
    next(batches)
    state = ahead.state_dict()
    assert state["consumed"] == 1
    again.load_state_dict(state)
    assert list(again) == list(loader())[1:]


def test_another_order_is_refused():
    with pytest.raises(UserError, match="cannot resume in the same order: seed was 0, now it is 1"):
        loader(seed=1).load_state_dict(loader().state_dict())
