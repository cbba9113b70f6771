"""Training one task: a small Lightning module around a strategy, one ``fit`` per task."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from unimoe.continual.strategies import Strategy
from unimoe.data.mix import MixedBatchSampler
from unimoe.errors import UserError
from unimoe.training.curve import CurveLogger
from unimoe.training.loader import ResumableLoader
from unimoe.training.module import ResumableModule, Schedule
from unimoe.training.progress import PlainProgress
from unimoe.training.resume import LastCheckpoint, newest

from .stream import Experience

log = logging.getLogger(__name__)

ROUTING_LOG = "routing.jsonl"


@dataclass
class TrainingConfig:
    """How each task is trained; the same for every strategy."""

    batch_size: int = 16
    """New samples of a step."""
    lr: float = 2e-4
    """Peak learning rate of AdamW (CoIN's scripts)."""
    router_lr: float | None = None
    """Of the routers' rows; None takes ``lr``."""
    schedule: Schedule = "cosine"
    """Of the learning rate after the warm-up: down to zero within each task by a cosine or a line, or
    constant."""
    warmup: float = 0.03
    """Share of a task's steps in which the learning rate rises from zero."""
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest norm of the gradient."""
    checkpoint_every: int = 50
    """Steps between checkpoints inside a task."""
    log_every: int = 10
    """Steps between rows of the logs."""
    gradient_checkpointing: bool = False
    """Compute the blocks again in the backward pass instead of keeping their activations."""
    precision: str = "32-true"
    """Lightning's; routing is float32 in any case."""
    accelerator: str = "auto"
    """Lightning's."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.lr <= 0 or self.checkpoint_every < 1 or self.log_every < 1:
            raise UserError(
                "training: batch_size, lr, checkpoint_every and log_every must be above 0, found "
                f"{self.batch_size}, {self.lr}, {self.checkpoint_every} and {self.log_every}"
            )


class TaskModule(ResumableModule):
    """One task under one strategy; checkpoints hold what trains and nothing else."""

    def __init__(self, strategy: Strategy, config: TrainingConfig, steps: int, seed: int, routing_log: Path):
        super().__init__()
        self.strategy, self.config, self.steps, self.routing_log = strategy, config, steps, routing_log
        self.seed, self.schedule, self.warmup = seed, config.schedule, config.warmup
        self.model = strategy.learner.model

    def configure_optimizers(self) -> Any:
        trained = self.strategy.learner.trainable()
        routers = [p for name, p in trained.items() if ".gating." in name]
        others = [p for name, p in trained.items() if ".gating." not in name]
        rates = ((others, self.config.lr), (routers, self.config.router_lr or self.config.lr))
        groups = [{"params": parameters, "lr": lr} for parameters, lr in rates if parameters]
        return self.scheduled(torch.optim.AdamW(groups, weight_decay=self.config.weight_decay))

    def training_step(self, batch: list[dict[str, Any]], batch_idx: int) -> Tensor:
        step = self.global_step
        self.strategy.watched = step % self.config.log_every == 0
        loss = self.strategy.loss(batch, step, self.steps)
        if not loss.requires_grad:  # guidance may keep every token of a batch from everything that trains
            loss = loss + sum(0.0 * p.sum() for p in self.strategy.learner.trainable().values())
        self.log_row({"loss": loss.item(), "lr": self.config.lr * self.rate(step, self.steps)}, batch_idx)
        if self.strategy.watched and (seen := self.strategy.observed()):
            with self.routing_log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **seen}) + "\n")
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.strategy.before_step()


def train_task(
    strategy: Strategy, task: Experience, config: TrainingConfig, folder: Path, seed: int, label: str
) -> float:
    """Train ``task``, going on from the checkpoint in ``folder`` if there is one; returns the seconds spent,
    those of interrupted runs included."""
    steps = task.steps(config.batch_size)
    routing_log = folder / ROUTING_LOG
    module = TaskModule(strategy, config, steps, seed * 1009 + task.index, routing_log)
    curve = CurveLogger(folder)
    checkpoint = LastCheckpoint(folder / "last.ckpt", config.checkpoint_every)
    resume, done = newest(checkpoint.path) or (None, 0)
    curve.cut(done)
    _cut_routing(routing_log, done)
    if resume:
        log.info("%s  goes on after step %d of %d", label, done, steps)
    trainer = Trainer(
        max_steps=steps,
        accelerator=config.accelerator,
        devices=1,
        precision=config.precision,  # type: ignore[arg-type]
        logger=curve,
        callbacks=[checkpoint, PlainProgress(label)],
        gradient_clip_val=config.clip,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=config.log_every,
        default_root_dir=folder,
    )
    trainer.fit(
        module, _loader(strategy, task, config.batch_size, steps, seed), ckpt_path=resume, weights_only=True
    )
    return checkpoint.seconds


def _loader(strategy: Strategy, task: Experience, batch_size: int, steps: int, seed: int) -> ResumableLoader:
    """Batches of the task's samples, joined by what the strategy rehearses; a function of seed and step."""
    past, joined = strategy.rehearsed(task, batch_size)
    sizes, counts = [len(task.samples)], [batch_size]
    if joined:
        sizes, counts = [*sizes, len(past)], [*counts, joined]
    sampler = MixedBatchSampler(sizes, counts, steps, seed=seed * 1009 + task.index)
    samples: Sequence[Any] = [*task.samples, *past]
    return ResumableLoader(samples, batch_sampler=sampler, collate_fn=strategy.learner.collate)  # type: ignore[arg-type]


def _cut_routing(path: Path, step: int) -> None:
    """Drop the rows that a resumed run writes again, and a last one that a kill cut short."""
    if path.is_file():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines(True) if line.endswith("}\n")]
        path.write_text("".join(line for line in lines if json.loads(line)["step"] < step), encoding="utf-8")
