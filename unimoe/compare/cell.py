"""One cell of a comparison: one design trained with one seed, and what is measured of it."""

import time
from statistics import fmean, median
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from unimoe.data.collate import count_tokens
from unimoe.model.host_loss import answer_loss
from unimoe.model.loss import aux_loss
from unimoe.model.modeling import UniMoeForConditionalGeneration
from unimoe.moe import record
from unimoe.moe.install import moe_layers
from unimoe.moe.join import join
from unimoe.moe.routers.base import Router
from unimoe.moe.view import expert_counts
from unimoe.stages.anneal import check_anneal, losses_at, set_knobs
from unimoe.training.module import ResumableModule
from unimoe.training.progress import PlainProgress

from .budget import Cost, measure
from .config import CompareConfig
from .data import CompareData, Step
from .design import Design
from .evaluation import Evaluation, NotFinite, evaluate


class CellModule(ResumableModule):
    """Trains what requires a gradient with AdamW on next-token cross-entropy and the auxiliary losses."""

    def __init__(
        self, model: UniMoeForConditionalGeneration, design: Design, config: CompareConfig, seed: int
    ):
        """
        Args:
            model: of the design, in training mode.
            design: its schedules.
            config: optimizer and its learning rates.
            seed: of the steps.

        Raises:
            UserError: a schedule that does not fit the model.
        """
        super().__init__()
        check_anneal(design.anneal, model)
        self.model, self.anneal, self.config = model, design.anneal, config
        self.seed, self.schedule, self.warmup = seed, config.schedule, config.warmup
        self.rows: list[dict[str, float]] = []
        """One of each step: its loss, tokens and seconds."""
        self._step_began = 0.0

    def configure_optimizers(self) -> Any:
        routers = [part for part in self.model.modules() if isinstance(part, Router)]
        own = {parameter for router in routers for parameter in router.parameters()}
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                rate = self.config.router_lr if parameter in own else None
                decay = self.config.weight_decay if parameter.ndim > 1 else 0.0
                groups.setdefault((rate or self.config.lr, decay), []).append(parameter)
        settings = [{"params": p, "lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()]
        return self.scheduled(torch.optim.AdamW(settings))

    def training_step(self, batch: Step, batch_idx: int) -> Tensor:
        set_knobs(self.anneal, self.model, self.global_step)
        with record() as parts:
            loss, _ = answer_loss(self.model, batch)
        records = join(parts)
        self.count_load(records)
        losses = losses_at(self.anneal, (self.model.config.moe or {}).get("losses", {}), self.global_step)
        whole = loss + aux_loss(self.model, records, losses=losses)
        if not bool(whole.isfinite()):
            raise NotFinite(f"the loss is {float(whole.detach())} at step {self.global_step}")
        row = {"step": float(self.global_step), "train/loss": float(loss.detach())}
        self.rows.append(row | {"tokens": self.batch_amount(batch)})
        return whole

    def on_train_batch_start(self, batch: Step, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self._step_began = time.perf_counter()  # without the data, which the first design of a seed prepares

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the time of the base class's step, which also runs the training step."""
        super().optimizer_step(*args, **kwargs)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.rows[-1]["seconds"] = time.perf_counter() - self._step_began

    def batch_amount(self, batch: Step) -> float:
        """Tokens without padding."""
        return float(sum(map(count_tokens, batch)))


def train_cell(
    model: UniMoeForConditionalGeneration, design: Design, config: CompareConfig, data: CompareData, seed: int
) -> dict[str, Any]:
    """Train a model and measure it.

    Returns:
        What the cell's file holds of the result: ``failed`` (empty, or why it has none), losses, curve, cost,
        speed, routing.
    """
    began = time.monotonic()
    module, evaluation = (
        CellModule(model, design, config, seed),
        Evaluation(data, config.watched, config.val_every),
    )
    failed = ""
    try:
        progress = PlainProgress(f"{design.name}, seed {seed}")
        trainer(config.steps, [evaluation, progress]).fit(module, data.train(seed, config.steps))
    except NotFinite as error:
        failed = str(error)
    speeds = [row["tokens"] / row["seconds"] for row in module.rows[1:]]  # the first step warms up
    curve = [*module.rows, *_validations(evaluation, config)]
    found = {"failed": failed, "curve": curve, "seconds": round(time.monotonic() - began, 1)}
    if failed:
        return found
    routing, visits = {}, None
    if layers := moe_layers(model):
        routing = evaluation.routing.summary(layers)
        visits = evaluation.routing.stats.experts_per_token(expert_counts(model))
    cost: Cost = measure(model, visits)
    return found | {
        "start": evaluation.losses[0],
        "losses": evaluation.losses[config.steps],
        "exact": evaluation.exact[config.steps],
        "cost": vars(cost),
        "tokens_per_second": round(median(speeds), 1) if speeds else None,
        "routing": routing,
    }


def estimate_seconds(
    model: UniMoeForConditionalGeneration, design: Design, config: CompareConfig, data: CompareData, seed: int
) -> float:
    """How long a cell of ``design`` takes, from two steps (after one that warms up) and a batch of each
    held-out file."""
    began = time.perf_counter()
    batches = list(data.train(seed, 3))
    prepared = (time.perf_counter() - began) / 3
    module = CellModule(model, design, config, seed)
    trainer(3, []).fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    seconds = config.steps * (prepared + fmean(row["seconds"] for row in module.rows[1:]))
    checks = {"val": 2, "test": 2}
    checks[config.watched] += (config.steps - 1) // (config.val_every or config.steps)
    model.eval()
    for split, times in checks.items():
        for held in data.evaluation(split).values():
            began = time.perf_counter()
            evaluate(model, held[:1])
            seconds += times * len(held) * (time.perf_counter() - began)
    return seconds


def trainer(steps: int, callbacks: list[Callback]) -> Trainer:
    """One device, and nothing that is written."""
    return Trainer(
        max_steps=steps,
        devices=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )


def _validations(evaluation: Evaluation, config: CompareConfig) -> list[dict[str, float]]:
    """Mean loss over the watched files, as rows of the curve."""
    names = config.data.eval_files[config.watched]
    return [
        {"step": float(step), "val/loss": fmean(losses[name] for name in names)}
        for step, losses in evaluation.losses.items()
    ]
