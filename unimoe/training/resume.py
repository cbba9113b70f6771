"""Going on after an interruption: the last checkpoint of a stage, written whole or not at all."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from unimoe.errors import UserError


class Interrupted(Exception):
    """Somebody pressed Ctrl-C (or sent SIGTERM), and the state of the last step is on disk."""


class LastCheckpoint(Checkpoint):
    """Writes ``last.ckpt`` every so many optimizer steps, at the end, and when the run is asked to stop.

    The file is written under another name and renamed, so that a kill at any moment leaves a whole one. On
    the first Ctrl-C or SIGTERM the current step is finished and saved, then ``Interrupted`` is raised; a
    second one stops at once.
    """

    def __init__(self, path: Path, every: int):
        super().__init__()
        self.path = path
        self.every = every
        self.seconds_before = 0.0
        self._stop = False
        self._began = time.monotonic()
        self._handlers: dict[signal.Signals, Any] = {}

    @property
    def seconds(self) -> float:
        """Training time so far, that of earlier, interrupted runs included."""
        return self.seconds_before + time.monotonic() - self._began

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds_before = state_dict["seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._ask_to_stop)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ):
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # in the middle of an optimizer step
        if self._stop or trainer.global_step % self.every == 0:
            self.save(trainer)
        if self._stop:
            raise Interrupted(f"stopped after step {trainer.global_step}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)
        self._restore_handlers()  # before Lightning restores its own, or its handler would keep the trainer

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def save(self, trainer: Trainer) -> None:
        """Write the checkpoint now."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".tmp")
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            os.replace(temporary, self.path)

    def _ask_to_stop(self, number: int, frame: Any) -> None:
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True


def saved_step(path: Path) -> int:
    """The optimizer steps behind a checkpoint. Raises UserError when the file is damaged."""
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True)["global_step"])
    except Exception as error:  # torch raises a dozen kinds for a damaged file; all mean the same
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{path} is damaged ({reason}); delete it to begin this stage again") from error
