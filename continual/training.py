"""Training one task: a small Lightning module around a strategy, one ``fit`` per task."""

import json
import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed import all_reduce

from unimoe.continual.strategies import Strategy
from unimoe.data.mixed_sampler import MixedBatchSampler
from unimoe.errors import UnfinishedRun, UserError, first_line
from unimoe.model.inputs import Batch
from unimoe.moe import record
from unimoe.training.curve import CurveLogger
from unimoe.training.elastic import check_processes, own_store
from unimoe.training.loader import ResumableLoader
from unimoe.training.module import ResumableModule, Schedule
from unimoe.training.progress import PlainProgress
from unimoe.training.ranks import mean_over_ranks
from unimoe.training.resume import LastCheckpoint, check_finished, latest_checkpoint

from .learner import current_names
from .stream import Experience

log = logging.getLogger(__name__)

ROUTING_LOG = "routing.jsonl"


@dataclass
class TrainingConfig:
    """Training of each task; the same for every strategy."""

    batch_size: int = 16
    """New samples per step, over all devices."""
    lr: float = 2e-4
    """Peak learning rate of AdamW (CoIN's scripts)."""
    router_lr: float | None = None
    """Learning rate of the routers; None takes ``lr``."""
    schedule: Schedule = "cosine"
    """Learning rate after the warm-up: cosine or linear decay to zero within each task, or constant."""
    warmup: float = 0.03
    """Fraction of a task's steps in which the learning rate rises from zero."""
    weight_decay: float = 0.0
    clip: float = 1.0
    """Maximum norm of the gradient."""
    checkpoint_every: int = 50
    """Steps between checkpoints inside a task."""
    log_every: int = 10
    """Steps between rows of the logs."""
    gradient_checkpointing: bool = False
    """Recompute the blocks in the backward pass instead of storing their activations."""
    precision: str = "32-true"
    """Lightning's; routing is float32 in any case."""
    accelerator: str = "auto"
    """Lightning's."""
    devices: int = 1
    """Devices per machine, each with a process that takes its share of every step's samples."""
    num_nodes: int = 1
    """Machines."""
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """Use of several processes: replicate the base, or shard its blocks; adapters are always replicated."""

    @property
    def processes(self) -> int:
        return self.devices * self.num_nodes

    def __post_init__(self) -> None:
        if not 1 <= self.processes <= self.batch_size:
            raise UserError(
                f"training: a step of {self.batch_size} samples (batch_size) cannot be divided among "
                f"{self.processes} processes (devices, num_nodes)"
            )
        if self.batch_size < 1 or self.lr <= 0 or self.checkpoint_every < 1 or self.log_every < 1:
            raise UserError(
                "training: batch_size, lr, checkpoint_every and log_every must be above 0, found "
                f"{self.batch_size}, {self.lr}, {self.checkpoint_every} and {self.log_every}"
            )
        if not 0 <= self.warmup <= 1 or self.clip <= 0:
            found = f"{self.warmup} and {self.clip}"
            raise UserError(f"training: warmup must be from 0 to 1 and clip above 0, found {found}")


hold_store = cache(own_store)
"""Kept by the first process until it ends, over all runs of a comparison."""


def launch(config: TrainingConfig) -> Fabric:
    """The processes of a run, started unless they already run.

    Raises:
        UserError: for devices or a precision that are not available.
    """
    settings: dict[str, Any] = {"accelerator": config.accelerator, "devices": config.devices}
    settings["precision"] = config.precision  # the trainer's; tried here, before anything is written
    several = "ddp" if config.processes > 1 else "auto"
    check_processes(config.processes)
    hold_store()
    try:
        fabric = Fabric(num_nodes=config.num_nodes, strategy=several, **settings)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"training: {first_line(error)}") from error
    fabric.launch()
    return fabric


class ManualAllReduceStrategy(DDPStrategy):
    """DDP of what trains, around a base that is divided: gradients are averaged when the backward pass is
    over. In its midst, ranks whose tokens reach different experts would meet in a different order."""

    def configure_ddp(self) -> None:
        """No wrapper."""

    def post_backward(self, closure_loss: Tensor) -> None:
        assert self.lightning_module is not None
        for parameter in self.lightning_module.parameters():
            if parameter.grad is not None:
                all_reduce(parameter.grad.div_(self.world_size))


class TaskModule(ResumableModule):
    """One task under one strategy; checkpoints hold the trained weights alone."""

    def __init__(self, strategy: Strategy, config: TrainingConfig, steps: int, seed: int, routing_log: Path):
        super().__init__()
        self.strategy, self.config, self.steps, self.routing_log = strategy, config, steps, routing_log
        self.seed, self.schedule, self.warmup = seed, config.schedule, config.warmup
        self.model = strategy.learner.model

    def configure_optimizers(self) -> Any:
        trained = self.strategy.learner.trainable()
        routers = [p for name, p in trained.items() if ".router." in name]
        others = [p for name, p in trained.items() if ".router." not in name]
        router_lr = self.config.lr if self.config.router_lr is None else self.config.router_lr
        rates = ((others, self.config.lr), (routers, router_lr))
        groups = [{"params": parameters, "lr": lr} for parameters, lr in rates if parameters]
        return self.scheduled(torch.optim.AdamW(groups, weight_decay=self.config.weight_decay))

    def training_step(self, batch: list[Batch], batch_idx: int) -> Tensor:
        step, strategy = self.global_step, self.strategy
        strategy.before_training_iteration()
        logged = step % self.config.log_every == 0
        with record() if logged else nullcontext([]) as records:
            loss = strategy.loss(batch, step, self.steps) + strategy.penalty()
        # guidance may keep all tokens of a process from the trained bank, whose gradients are then zero
        loss = loss + sum(0.0 * p.sum() for p in strategy.learner.trainable().values())
        shown = mean_over_ranks(loss).item()
        if not math.isfinite(shown):
            raise UnfinishedRun(f"the loss is {shown} at step {step}; try a smaller training.lr")
        self.log_row({"loss": shown, "lr": self.config.lr * self.rate(step, self.steps)}, batch_idx)
        seen = strategy.routing(records) if logged else {}
        if seen and self.trainer.is_global_zero:
            with self.routing_log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **seen}) + "\n")
        return loss

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = current_names(checkpoint["state_dict"])
        super().on_load_checkpoint(checkpoint)


def task_seed(seed: int, index: int) -> int:
    """The seed of one task, small enough for torch after :class:`ResumableModule` has multiplied it."""
    return (seed * 1009 + index) % 2**32


class SharedSampler(MixedBatchSampler):
    """Gives each rank its share of the batches of a single process."""

    def __init__(self, ranks: int, rank: int, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.share = slice(rank, None, ranks)

    def batch(self, step: int) -> list[int]:
        return super().batch(step)[self.share]


def train_task(
    strategy: Strategy, task: Experience, config: TrainingConfig, folder: Path, seed: int, label: str
) -> float:
    """Train ``task``, from the checkpoint in ``folder`` if there is one. All processes of the run call it.

    Returns:
        Training time in seconds, including that of interrupted runs.

    Raises:
        UnfinishedRun: if the task ends before its last step, or its loss or weights are not finite.
    """
    steps = task.steps(config.batch_size)
    routing_log = folder / ROUTING_LOG
    module = TaskModule(strategy, config, steps, task_seed(seed, task.index), routing_log)
    curve = CurveLogger(folder)
    checkpoint = LastCheckpoint(folder / "last.ckpt", config.checkpoint_every)
    resume, done = latest_checkpoint(checkpoint.path) or (None, 0)
    several = ManualAllReduceStrategy() if strategy.learner.divided else "ddp"
    trainer = Trainer(
        max_steps=steps,
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=several if config.processes > 1 else "auto",
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
    curve.cut(done)
    if trainer.is_global_zero:
        _cut_routing(routing_log, done)
    if resume:
        log.info("%s  resumes after step %d of %d", label, done, steps)
    ranks = (trainer.world_size, trainer.global_rank)
    batches = _loader(strategy, task, config.batch_size, steps, seed, ranks)
    trainer.fit(module, batches, ckpt_path=resume, weights_only=True)
    check_finished(trainer)
    return checkpoint.seconds


def _loader(
    strategy: Strategy, task: Experience, batch_size: int, steps: int, seed: int, ranks: tuple[int, int]
) -> ResumableLoader:
    """A rank's share of the batches: the task's samples and the strategy's replay samples, as a function of
    seed and step."""
    past, joined = strategy.replay_samples(task, batch_size)
    sizes, counts = [len(task.samples)], [batch_size]
    if joined:
        sizes, counts = [*sizes, len(past)], [*counts, joined]
    sampler = SharedSampler(*ranks, sizes, counts, steps, seed=task_seed(seed, task.index))
    samples: Sequence[Any] = [*task.samples, *past]
    return ResumableLoader(samples, batch_sampler=sampler, collate_fn=strategy.learner.collate)  # type: ignore[arg-type]


def _cut_routing(path: Path, step: int) -> None:
    """Drop the rows that a resumed run writes again, and an incomplete last one."""
    if path.is_file():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines(True) if line.endswith("}\n")]
        path.write_text("".join(line for line in lines if json.loads(line)["step"] < step), encoding="utf-8")
