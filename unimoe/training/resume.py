"""Going on after an interruption: the last two checkpoints of a stage, written whole or not at all."""

import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader

from unimoe.errors import UserError, first_line

from .sharding import META, AnyCheckpoint

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """Somebody pressed Ctrl-C (or sent SIGTERM), and the state of the last step is on disk."""


class LastCheckpoint(Checkpoint):
    """Writes ``last.ckpt`` every so many optimizer steps, at the end, and when the run is asked to stop.

    Training waits until the state is copied to the CPU's memory; a thread writes the copy. The file (or
    folder, where weights are sharded) is written under another name and renamed, so that a kill at any moment
    leaves a whole one; the one before is kept beside it. When it cannot be written, a warning says so, the
    one before stays, and training goes on. On the first Ctrl-C or SIGTERM, of any process, the current step
    is finished and saved, then ``Interrupted`` is raised; a second one stops without saving.
    """

    def __init__(self, path: Path, every: int):
        super().__init__()
        self.path = path
        self.every = every
        self.seconds_before = 0.0
        self._io = AnyCheckpoint()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._written: Future[bool] | None = None
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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.strategy.checkpoint_io = self._io

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
        stop = trainer.strategy.reduce_boolean_decision(self._stop, all=False)
        if stop or trainer.global_step % self.every == 0:
            self.save(trainer)
        if stop:
            # of all processes together: torchrun ends the others when one leaves
            saved = trainer.strategy.reduce_boolean_decision(self.wait())
            what = "" if saved else ", with the checkpoint before it"
            raise Interrupted(f"stopped after step {trainer.global_step}{what}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)
        self.wait()
        self._restore_handlers()  # before Lightning restores its own, or its handler would keep the trainer

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore_handlers()
        self.wait()

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def save(self, trainer: Trainer) -> None:
        """Copy the state now, for a thread to write; wait before that until the copy before is written."""
        self.wait()
        temporary = self.path.with_name(self.path.name + ".tmp")
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _remove(temporary)  # of a kill in the middle
        trainer.strategy.barrier()
        with self._io.deferred() as writes:
            trainer.save_checkpoint(temporary)
        step = trainer.global_step if trainer.is_global_zero else None
        self._written = self._thread.submit(self._complete, writes, temporary, step)

    def wait(self) -> bool:
        """Until the last checkpoint is written; whether it could be."""
        return self._written is None or self._written.result()

    def _complete(self, writes: list[Callable[[], object]], temporary: Path, step: int | None) -> bool:
        """Write what was copied, and on the first process (``step`` is None on others) give it its name."""
        try:
            for write in writes:
                write()
            if step is not None:
                if self.path.exists():
                    _remove(before(self.path))
                    os.replace(self.path, before(self.path))
                os.replace(temporary, self.path)
        except (OSError, RuntimeError, CheckpointException) as error:
            if step is not None:
                free = shutil.disk_usage(self.path.parent).free / 1e9
                left = "the one before it stays" if self.path.exists() else "there is none yet"
                reason = f"{first_line(_cause(error))}; {free:.1f} GB are free"
                log.warning("the checkpoint of step %d cannot be written (%s); %s", step, reason, left)
                _remove(temporary)
            return False
        return True

    def _ask_to_stop(self, number: int, frame: Any) -> None:
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True


def _cause(error: BaseException) -> BaseException:
    """What went wrong first, on the first process where something did."""
    if isinstance(error, CheckpointException) and error.failures:
        error = error.failures[min(error.failures)][0]
    while not isinstance(error, OSError) and error.__context__ is not None:
        error = error.__context__
    return error


def before(path: Path) -> Path:
    """Where the checkpoint before the one at ``path`` lies."""
    return path.with_name("previous.ckpt")


def latest_checkpoint(path: Path) -> tuple[Path, int] | None:
    """The checkpoint to go on from and the optimizer steps behind it, None where there is none.

    When the one at ``path`` is damaged, that is the one before it, and a warning says so. Raises UserError
    when none is whole.
    """
    problem = None
    for candidate in (path, before(path)):
        if candidate.exists():
            try:
                found = candidate, saved_step(candidate)
            except UserError as error:
                problem = error
                continue
            if problem is not None:
                log.warning("%s; going on from the one before it, of step %d", problem, found[1])
            return found
    if problem is not None:
        raise problem
    return None


def remove(path: Path) -> None:
    """Remove the checkpoint at ``path`` and the one before it."""
    for one in (path, before(path)):
        _remove(one)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def saved_step(path: Path) -> int:
    """The optimizer steps behind a checkpoint. Raises UserError when the file is damaged."""
    try:
        if path.is_dir():
            _check_shards(path)
        state = torch.load(path / META if path.is_dir() else path, map_location="cpu", weights_only=True)
        return int(state["global_step"])
    except Exception as error:  # torch raises a dozen kinds for a damaged file; all mean the same
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{path} is damaged ({reason}); delete it to begin this stage again") from error


def _check_shards(folder: Path) -> None:
    """Raises EOFError when a file of a sharded checkpoint is shorter than its index says."""
    ends: dict[str, int] = {}
    for piece in FileSystemReader(folder).read_metadata().storage_data.values():
        ends[piece.relative_path] = max(ends.get(piece.relative_path, 0), piece.offset + piece.length)
    for name, end in ends.items():
        size = (folder / name).stat().st_size
        if size < end:
            raise EOFError(f"{name} has {size} of {end} bytes")
