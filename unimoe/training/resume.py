"""Resuming after an interruption: the last two checkpoints of a run, each complete or absent."""

import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.tensor import DTensor

from unimoe.errors import UnfinishedRun, UserError, first_line

from .sharding import META, AnyCheckpoint

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """The run received SIGINT (Ctrl-C) or SIGTERM, and the state of the last step is on disk."""


class LastCheckpoint(Checkpoint):
    """Writes ``last.ckpt`` every ``every`` optimizer steps, after the last one, and when the run must stop.

    Training waits until the state is copied to CPU memory; a thread writes the copy. The file (or folder,
    where weights are sharded) is written under a temporary name and renamed, so that a kill at any moment
    leaves a complete one; the previous one is kept beside it. If it cannot be written, a warning says so, the
    previous one stays, and training continues.

    A run ends before its last step in three ways, all of which can be resumed:

    * SIGINT (Ctrl-C) or SIGTERM to any process: the current step is finished and saved, then ``Interrupted``
      is raised; a second signal stops without saving.
    * The trainer is about to stop (``max_time``, ``limit_train_batches``, a callback): the step is saved and
      ``UnfinishedRun`` raised.
    * The loss or a trained weight is not finite: ``UnfinishedRun`` is raised, and the checkpoint before it
      stays.
    """

    def __init__(self, path: Path, every: int):
        """
        Args:
            path: file or folder of the checkpoint.
            every: optimizer steps between checkpoints.
        """
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
        """Training time so far, including that of interrupted runs that this one resumes."""
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
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self._check(trainer, [loss], f"the loss is {float(loss)}")
        last = batch_idx + 1 >= trainer.num_training_batches and not cast(Any, trainer).overfit_batches
        whole = (batch_idx + 1) % trainer.accumulate_grad_batches == 0  # not inside an optimizer step
        early = trainer.global_step < trainer.max_steps and (last or (whole and trainer.should_stop))
        stop = whole and trainer.strategy.reduce_boolean_decision(self._stop, all=False)
        if early:
            # or a resumed run would take the epoch, which holds all batches of the run, for done
            trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = False
        if whole and (stop or early or trainer.global_step % self.every == 0):
            self.save(trainer)
        if stop or early:
            # on all processes together: torchrun ends the others when one leaves
            saved = trainer.strategy.reduce_boolean_decision(self.wait()) and whole
            stopped = Interrupted if stop else UnfinishedRun
            what = "" if saved else ", of which the checkpoint is missing"
            raise stopped(f"stopped after step {trainer.global_step} of {trainer.max_steps}{what}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step >= trainer.max_steps:
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
        """Copy the state, for a thread to write, once the copy before it is written.

        Raises:
            UnfinishedRun: a weight that trains is not finite.
        """
        self.wait()
        trained = [p for p in trainer.lightning_module.parameters() if p.requires_grad]
        self._check(trainer, trained, "a trained weight is not finite")
        temporary = self.path.with_name(self.path.name + ".tmp")
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _remove(temporary)  # of a kill in the middle
        trainer.strategy.barrier()
        with self._io.deferred() as writes:
            trainer.save_checkpoint(temporary)
        step = trainer.global_step if trainer.is_global_zero else None
        self._written = self._thread.submit(self._complete, writes, temporary, step)

    @torch.no_grad()
    def _check(self, trainer: Trainer, values: Sequence[Tensor], problem: str) -> None:
        """Raises UnfinishedRun, on all ranks, where ``values`` are not finite on one."""
        local = [value.to_local() if isinstance(value, DTensor) else value for value in values]
        finite = not local or bool(torch.stack([part.isfinite().all() for part in local]).all())
        if not trainer.strategy.reduce_boolean_decision(finite):
            where = f"after step {trainer.global_step} of {trainer.max_steps}"
            raise UnfinishedRun(f"{problem} {where}; try a lower learning rate or another precision")

    def wait(self) -> bool:
        """Wait until the last checkpoint is written; returns whether that succeeded."""
        return self._written is None or self._written.result()

    def _complete(self, writes: list[Callable[[], object]], temporary: Path, step: int | None) -> bool:
        """Write the copies, and rename the checkpoint on rank 0 (``step`` is None on other ranks)."""
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
                kept = self.path.exists() or before(self.path).exists()
                left = "the previous one is kept" if kept else "there is none yet"
                reason = f"{first_line(_cause(error))}; {free:.1f} GB are free"
                log.warning("the checkpoint of step %d cannot be written (%s); %s", step, reason, left)
                _remove(temporary)
            return False
        return True

    def _ask_to_stop(self, number: int, frame: Any) -> None:
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True


def check_finished(trainer: Trainer) -> None:
    """Raises UnfinishedRun if a ``fit`` that returned did not reach its last step."""
    if trainer.global_step < trainer.max_steps:
        raise UnfinishedRun(f"stopped after step {trainer.global_step} of {trainer.max_steps}")


def _cause(error: BaseException) -> BaseException:
    """The first error of the lowest rank that has one."""
    if isinstance(error, CheckpointException) and error.failures:
        error = error.failures[min(error.failures)][0]
    while not isinstance(error, OSError) and error.__context__ is not None:
        error = error.__context__
    return error


def before(path: Path) -> Path:
    """The path of the previous checkpoint, beside ``path``."""
    return path.with_name("previous.ckpt")


def latest_checkpoint(path: Path) -> tuple[Path, int] | None:
    """The checkpoint to resume from.

    If the one at ``path`` is damaged, the previous one, with a warning.

    Returns:
        Its path and its optimizer steps, or None where there is no checkpoint.

    Raises:
        UserError: every checkpoint is damaged.
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
                log.warning("%s; resuming from the previous one, of step %d", problem, found[1])
            return found
    if problem is not None:
        raise problem
    return None


def remove(path: Path) -> None:
    """Remove the checkpoint at ``path`` and the previous one."""
    for one in (path, before(path)):
        _remove(one)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def saved_step(path: Path) -> int:
    """The optimizer steps of a checkpoint.

    Raises:
        UserError: the file is damaged.
    """
    try:
        if path.is_dir():
            _check_shards(path)
        state = torch.load(path / META if path.is_dir() else path, map_location="cpu", weights_only=True)
        return int(state["global_step"])
    except Exception as error:  # torch raises a dozen kinds for a damaged file; all mean the same
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{path} is damaged ({reason}); delete it to begin this stage again") from error


def _check_shards(folder: Path) -> None:
    """Raises EOFError if a file of a sharded checkpoint is shorter than its index says."""
    ends: dict[str, int] = {}
    for piece in FileSystemReader(folder).read_metadata().storage_data.values():
        ends[piece.relative_path] = max(ends.get(piece.relative_path, 0), piece.offset + piece.length)
    for name, end in ends.items():
        size = (folder / name).stat().st_size
        if size < end:
            raise EOFError(f"{name} has {size} of {end} bytes")
