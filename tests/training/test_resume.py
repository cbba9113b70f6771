import logging
import multiprocessing
import os
import resource
import signal
import threading
from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.distributed.fsdp import FSDPModule

from unimoe.errors import UserError
from unimoe.testing import StopAfter
from unimoe.training import sharding
from unimoe.training.resume import Interrupted, LastCheckpoint, latest_checkpoint, remove, saved_step


def write(path, step):
    torch.save({"global_step": step, "weights": torch.zeros(1000)}, path)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, caplog):
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    assert latest_checkpoint(last) is None
    write(last, 20)
    write(previous, 10)
    assert latest_checkpoint(last) == (last, 20)
    last.write_bytes(last.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(last) == (previous, 10)
    assert "last.ckpt is damaged" in caplog.text and "of step 10" in caplog.text
    previous.write_bytes(b"")
    with pytest.raises(UserError, match=r"last\.ckpt|previous\.ckpt"):
        latest_checkpoint(last)
    remove(last)
    assert latest_checkpoint(last) is None


def test_a_kill_between_two_renamings_leaves_the_one_before(tmp_path):
    write(tmp_path / "previous.ckpt", 10)
    assert latest_checkpoint(tmp_path / "last.ckpt") == (tmp_path / "previous.ckpt", 10)


class Line(LightningModule):
    """Weights that change with every step."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class At(Callback):
    """Does something at the end of a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_train_batch_end(self, trainer, pl_module, *arguments):
        if trainer.global_step == self.step:
            self.act(trainer)


class ShardedLine(Line):
    def configure_model(self):
        if not isinstance(self.layer, FSDPModule):
            sharding.shard(self, [self.layer])


def train(folder, *callbacks, module=Line, strategy="auto"):
    """Six steps, with checkpoints after every second one; returns where the newest is."""
    path = folder / "last.ckpt"
    trainer = Trainer(
        max_steps=6,
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[LastCheckpoint(path, 2), *callbacks],
    )
    trainer.fit(module(), torch.utils.data.DataLoader(torch.ones(6, 2)))
    return path


def test_training_goes_on_while_the_state_as_it_was_is_written(tmp_path, monkeypatch):
    write, go_on, found = sharding._write, threading.Event(), {}

    def held(checkpoint, path):
        found["in time"] = go_on.wait(60)
        write(checkpoint, path)
        found.setdefault("written", checkpoint)

    monkeypatch.setattr(sharding, "_write", held)
    weights = At(2, lambda trainer: found.update(there=trainer.model.layer.weight.detach().clone()))
    train(tmp_path, weights, At(3, lambda trainer: go_on.set()))
    assert found["in time"], "step 3 waited for the checkpoint of step 2"
    assert found["written"]["global_step"] == 2
    torch.testing.assert_close(found["written"]["state_dict"]["layer.weight"], found["there"], rtol=0, atol=0)
    assert saved_step(tmp_path / "last.ckpt") == 6


@contextmanager
def full_disk():
    """No file may grow beyond 1000 bytes from step 3 on, which the writer meets as it would a full disk. No
    fixture: pytest's own output, where it goes to a file, would meet it too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(trainer):
        trainer.checkpoint_callback.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))

    try:
        yield At(3, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def in_another_process(act):
    """Its exit status."""
    process = multiprocessing.get_context("fork").Process(target=act)
    process.start()
    process.join(200)
    return process.exitcode


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, caplog):
    with full_disk() as full:
        path = train(tmp_path, full)
    said = [message for message in caplog.messages if "cannot be written" in message]
    assert said[0].startswith("the checkpoint of step 4") and said[-1].startswith("the checkpoint of step 6")
    assert "too large" in said[-1] and said[-1].endswith("GB are free); the previous one is kept")
    assert latest_checkpoint(path) == (path, 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.ckpt"]


def test_a_rename_that_fails_leaves_the_checkpoint_before(tmp_path, caplog, monkeypatch):
    last, previous, rename = tmp_path / "last.ckpt", tmp_path / "previous.ckpt", os.replace

    def fails(source, target):
        if target == last and previous.exists():  # which is renamed first
            raise OSError("no second name")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fails)
    train(tmp_path)
    said = [message for message in caplog.messages if "cannot be written" in message]
    assert said and all("no second name" in message for message in said)
    assert all(message.endswith("the previous one is kept") for message in said)
    assert latest_checkpoint(last) == (previous, 2)


def test_a_full_disk_leaves_the_shards_before(tmp_path):
    def shards():
        with (tmp_path / "said").open("w", buffering=1) as said, full_disk() as full:
            logging.getLogger("unimoe").addHandler(logging.StreamHandler(said))
            train(tmp_path, full, module=ShardedLine, strategy="fsdp2")

    assert in_another_process(shards) == 0
    said = (tmp_path / "said").read_text()
    assert "the checkpoint of step 4 cannot be written" in said and "the previous one is kept" in said
    assert latest_checkpoint(tmp_path / "last.ckpt") == (tmp_path / "last.ckpt", 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.ckpt", "said"]


def test_a_kill_in_the_middle_of_writing_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    write = sharding._write

    def killed(checkpoint, path):
        write(checkpoint, path)
        if checkpoint["global_step"] == 4:
            path.write_bytes(path.read_bytes()[:500])
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(sharding, "_write", killed)
    assert in_another_process(lambda: train(tmp_path)) == -signal.SIGKILL
    assert (tmp_path / "last.ckpt.tmp").stat().st_size == 500
    assert latest_checkpoint(tmp_path / "last.ckpt") == (tmp_path / "last.ckpt", 2)


def test_who_stops_a_run_waits_for_its_checkpoint(tmp_path, monkeypatch):
    write, asked = sharding._write, threading.Event()

    def late(checkpoint, path):
        asked.wait(0.3)
        write(checkpoint, path)

    monkeypatch.setattr(sharding, "_write", late)
    with pytest.raises(Interrupted, match="^stopped after step 3 of 6$"):
        train(tmp_path, StopAfter(3))
    assert latest_checkpoint(tmp_path / "last.ckpt") == (tmp_path / "last.ckpt", 3)
