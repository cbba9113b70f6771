import logging
from types import SimpleNamespace

import pytest

from unimoe.training import progress
from unimoe.training.progress import PlainProgress, clock


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1:00 min"),
        (187, "3:07 min"),
        (3599.6, "1:00:00 h"),
        (7500, "2:05:00 h"),
    ],
)
def test_remaining_time(seconds, expected):
    assert clock(seconds) == expected


def test_lines_at_the_first_and_last_step_and_every_ten_seconds(monkeypatch, caplog):
    """A run resumed after step 2 of 8; a step takes 4 s and two batches of 10 images each, of loss 0.5 + 1.5,
    which Lightning halves."""
    now = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    trainer = SimpleNamespace(global_step=2, max_steps=8, accumulate_grad_batches=2)
    module = SimpleNamespace(batch_amount=len, batch_unit="images")
    callback = PlainProgress("tiny", every_seconds=10.0)
    with caplog.at_level(logging.INFO, "unimoe"):
        callback.on_train_start(trainer, module)
        for batch_idx in range(12):
            now[0] += 2
            trainer.global_step = 2 + (batch_idx + 1) // 2
            loss = {"loss": 0.25} if batch_idx % 2 else 0.75
            callback.on_train_batch_end(trainer, module, loss, [0] * 10, batch_idx)
    assert [record.message for record in caplog.records] == [
        "tiny  step 3/8  loss 1.0000  5 images/s  20 s left",
        "tiny  step 6/8  loss 1.0000  5 images/s  8 s left",
        "tiny  step 8/8  loss 1.0000  5 images/s  0 s left",
    ]
