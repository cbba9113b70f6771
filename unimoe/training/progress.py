"""Progress: a bar in a terminal, plain lines in pipes and log files."""

import logging
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, RichProgressBar

from unimoe.data.collate import count_tokens

log = logging.getLogger(__name__)


class StageBar(RichProgressBar):
    """Lightning's bar, with the stage's name in place of the epoch."""

    def __init__(self, name: str):
        super().__init__(leave=True)
        self.name = name

    def _get_train_description(self, current_epoch: int) -> str:
        return self.name

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # the name of the log folder
        return dict(metrics)


class PlainProgress(Callback):
    """Logs step, mean loss, speed and remaining time, at the first and last step and in between.

    A module whose batches are not counted in tokens defines ``batch_amount(batch)`` and ``batch_unit``.
    """

    def __init__(self, name: str, every_seconds: float = 10.0):
        self.name = name
        self.every_seconds = every_seconds
        self._said = self._began = 0.0
        self._first = 0
        self._losses: list[float] = []
        self._amount = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic()
        self._first = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ):
        now, step, steps = time.monotonic(), trainer.global_step, trainer.max_steps
        loss = float(outputs["loss"]) if isinstance(outputs, dict) else float(outputs)
        self._losses.append(loss * trainer.accumulate_grad_batches)  # Lightning divides each batch's
        self._amount += getattr(pl_module, "batch_amount", _tokens)(batch)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        done = step - self._first
        if done < 1 or (done > 1 and step < steps and now - self._said < self.every_seconds):
            return
        left = (now - self._began) / done * (steps - step)
        rate = self._amount / max(now - (self._said or self._began), 1e-9)
        loss = sum(self._losses) / len(self._losses)
        log.info(
            "%s  step %d/%d  loss %.4f  %.0f %s/s  %s left",
            self.name,
            step,
            steps,
            loss,
            rate,
            getattr(pl_module, "batch_unit", "tokens"),
            clock(left),
        )
        self._said, self._losses, self._amount = now, [], 0.0


def _tokens(batch: Any) -> float:
    return sum(map(count_tokens, batch))


def clock(seconds: float) -> str:
    """12 s, 3:07 min or 2:05:00 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d} h"
