"""Trains answering and drawing together, or adapts the drawing of a trained model.

Shapes: B images of a batch, N of a split, K classes.
"""

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from unimoe.applications.labelled_images import Batch
from unimoe.applications.pictures import write_sheet
from unimoe.applications.process import RectifiedFlow, draw_each, draw_guided
from unimoe.artifacts import differences, flatten
from unimoe.errors import UserError
from unimoe.moe import record
from unimoe.training.application import (
    ApplicationConfig,
    ApplicationModule,
    load_weights,
    read_network,
    run_application,
)
from unimoe.training.ranks import rank_weighted

from .adapt import adapt
from .data import UnifiedData
from .network import UnifiedNet, UnifiedNetConfig, answer_loss, prompts, questions

CALIBRATION = 256
"""Training images that measure the importance of units."""


@dataclass
class UnifiedConfig(ApplicationConfig):
    """Settings of :class:`UnifiedModule`, the keys under ``model:``."""

    unified: UnifiedNetConfig = field(default_factory=UnifiedNetConfig)
    """The transformer."""
    adapt_from: str | None = None
    """Folder of a finished run of a dense model whose drawing branch is adapted to ``unified.design`` and
    trained on; answers stay as they are. Not with ``init_from``, which continues an adapted model."""
    frozen: float | None = None
    """Share of the steps in which the routers of ``moe`` alone train, by default 0.5."""
    drop: float = 0.1
    """Share of training images that are drawn without their class, for guidance."""
    samples: int = 8
    """Samples of each class, drawn by ``unimoe test`` into a sheet; the model itself names what they show."""
    guidance: float = 3.0
    """Guidance scale of these samples; 1 is no guidance."""


class UnifiedModule(ApplicationModule):
    """Cross-entropy of answers plus the mean squared error of the flow's velocity.

    The training step:

    1. time, noise, dropped class and question of each image, by the step's number and its place
    2. the velocity at those times, and its error
    3. the answers; an adapted model skips this, since they cannot change
    4. the auxiliary losses over the recorded routing
    """

    application = "unified"
    build = staticmethod(UnifiedNet.of)
    batch_unit = "images"
    config: UnifiedConfig
    model: UnifiedNet
    process = RectifiedFlow()

    def __init__(self, **settings: Any):
        """
        Args:
            settings: the fields of :class:`UnifiedConfig`.

        Raises:
            UserError: a number is out of range, a setting has no effect, or nothing is given that a sparse
                design is made of.
        """
        config = UnifiedConfig(**settings)
        super().__init__(config)
        design = config.unified.design
        if not 0 <= config.drop < 1:
            raise UserError(f"model.drop is {config.drop}, expected 0 to below 1")
        if config.frozen is not None and not 0 <= config.frozen <= 1:
            raise UserError(f"model.frozen is {config.frozen}, expected 0 to 1")
        if config.frozen is not None and design != "moe":
            raise UserError(
                f"model.frozen is {config.frozen}, but model.unified.design {design} has no routers"
            )
        if config.samples < 0:
            raise UserError(f"model.samples is {config.samples}, expected at least 0")
        if config.adapt_from is not None and config.init_from is not None:
            raise UserError(
                f"model.adapt_from is {config.adapt_from}, which model.init_from {config.init_from} leaves "
                "unread; set one of them"
            )
        if design != "dense" and config.adapt_from is None and config.init_from is None:
            raise UserError(
                f"model.unified.design is {design}, which is made of a dense model; set model.adapt_from"
            )

    def network_settings(self, data: UnifiedData) -> dict[str, Any]:
        about = {"classes": data.classes, "shape": [3, data.side]}
        return {"data": about, "unified": asdict(self.config.unified)}

    @property
    def adapted(self) -> bool:
        """Whether the drawing branch alone trains."""
        return self.config.adapt_from is not None or self.config.unified.design != "dense"

    def configure_model(self) -> None:
        """Build the network, and adapt the dense one to it where this is the start.

        Raises:
            UserError: the dense model does not fit.
        """
        if hasattr(self, "model"):
            return
        super().configure_model()
        if not self.adapted:
            return
        drawing = self.model.drawing()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad = name in drawing
        if self.config.adapt_from is not None:
            self._adapt(self.config.adapt_from)

    def _adapt(self, folder: str) -> None:
        """Give the model the weights of the dense one, which runs on the CPU in float32: Lightning builds
        models under the default device and dtype of the run."""
        found = read_network(folder, self.application)
        expected = {
            **self.network,
            "unified": {**self.network["unified"], "design": "dense"}
            | {name: found.get("unified", {}).get(name) for name in ("experts", "k")},
        }
        if found != expected:
            different = differences(flatten(found), flatten(expected))
            raise UserError(
                f"model.adapt_from: {folder} is no dense model of these data and sizes "
                f"({'; '.join(f'{key}: {values}' for key, values in different.items())})"
            )
        data = cast(Any, self.trainer).datamodule.sets["train"]
        dtype = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.float32)
            with torch.device("cpu"):
                dense = UnifiedNet.of(found)
                load_weights(dense, folder)
                batch = data.__getitems__(list(range(min(CALIBRATION, len(data)))))
                time_B, noise, _ = draw_each(self.process, batch.images, batch.index.tolist())
                x, _ = self.process.corrupt(batch.images, noise, time_B)
                adapt(dense.eval(), self.model, lambda: dense.velocity(x, time_B, prompts(batch.labels)))
        finally:
            torch.set_default_dtype(dtype)

    # ---------------------------------------------------------------- training

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        count = len(batch.images)
        # (1)
        seeds = self.sample_seeds(count, batch_idx)
        time_B, noise, drop_B = draw_each(self.process, batch.images, seeds)
        label_B = torch.where(drop_B < self.config.drop, -1, batch.labels)
        # (2)
        x, target = self.process.corrupt(batch.images, noise, time_B)
        with record() as records:
            error = (self.model.velocity(x, time_B, prompts(label_B)) - target).square().mean()
        losses = {"error": rank_weighted(error, count)}
        # (3)
        if not self.adapted:
            text_BW, answer_B = self._ask(batch.labels, drop_B)
            wrong = answer_loss(self.model.answer(batch.images, text_BW), answer_B).mean()
            losses["answer"] = rank_weighted(wrong, count)
        # (4)
        losses["auxiliary"] = self.auxiliary(records)
        loss = torch.stack(list(losses.values())).sum()
        self.log_step({"loss": loss, **losses}, count, batch_idx)
        return loss

    def _ask(self, label_B: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
        """A question about each image and its answer, by a number in 0..1: half of them are open; of the
        others half are about the image's class, and half about another."""
        classes = self.model.classes
        step_B = (4 * uniform_B).long()  # 0, 1: open; 2: its class; 3: another
        away_B = 1 + (1e4 * uniform_B).long() % (classes - 1)
        other_B = torch.where(step_B == 3, (label_B + away_B) % classes, label_B)
        return questions(label_B, other_B, step_B < 2)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Keep the gradients of the routers alone while the experts are frozen."""
        super().on_before_optimizer_step(optimizer)
        share = 0.5 if self.config.frozen is None else self.config.frozen
        frozen = share * self.trainer.max_steps
        if self.model.config.design == "moe" and self.trainer.global_step < frozen:
            for name, parameter in self.model.named_parameters():
                if ".router." not in name:
                    parameter.grad = None

    # ---------------------------------------------------------------- evaluation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Each image at one time with one noise, and with one question of each kind, which follow from its
        number."""
        time_B, noise, uniform_B = draw_each(self.process, batch.images, batch.index.tolist())
        x, target = self.process.corrupt(batch.images, noise, time_B)
        velocity = self.model.velocity(x, time_B, prompts(batch.labels))
        error_B = (velocity - target).square().flatten(1).mean(dim=1)
        right = []
        for kind in (uniform_B / 2, (1 + uniform_B) / 2):
            text_BW, answer_B = self._ask(batch.labels, kind.clamp(max=1 - 1e-6))
            right.append(self.model.answer(batch.images, text_BW).argmax(dim=1) == answer_B)
        self.keep(batch.index, error_B, *right)

    def report(self, split: str) -> None:
        error_N, open_N, closed_N = self.kept()
        found = {
            "loss": float(error_N.mean()),
            "accuracy": float(open_N.float().mean()),
            "accuracy_yes_no": float(closed_N.float().mean()),
        }
        if split == "test" and self.config.samples:
            found["recognised"] = self._recognised()
        parameters = {
            "total": sum(p.numel() for p in self.model.parameters()),
            "drawing": sum(p.numel() for p in self.model.drawing().values()),
        }
        self.log_scores(split, found, images=len(error_N), parameters=parameters)

    def _recognised(self) -> float:
        """Draw samples of each class, and return how many the model names rightly; the same on every rank."""
        classes = self.model.classes
        label_B = torch.arange(classes, device=self.device).repeat_interleave(self.config.samples)
        images = draw(self.model, label_B, self.config.guidance, seed=self.seed)
        text_BW, answer_B = questions(label_B, label_B, torch.ones_like(label_B, dtype=torch.bool))
        named_B = self.model.answer(images.clamp(-1, 1), text_BW).argmax(dim=1)
        if self.trainer.is_global_zero:
            write_sheet(self.logs / "samples.png", images, self.config.samples)
        return float((named_B == answer_B).float().mean())


def draw(model: UnifiedNet, label_B: Tensor, guidance: float, steps: int = 40, seed: int = 0) -> Tensor:
    """[B, C, S, S] images of classes [B], each from a noise of its own.

    Args:
        model: the network.
        label_B: classes, -1 for any.
        guidance: scale; 1 is none.
        steps: evaluations of the model, twice as many with guidance.
        seed: of the noise, which is the same on every device.
    """
    text_BW, none_BW = prompts(label_B), prompts(torch.full_like(label_B, -1))
    return draw_guided(
        RectifiedFlow(),
        lambda x, time_B: model.velocity(x, time_B, text_BW),
        lambda x, time_B: model.velocity(x, time_B, none_BW),
        (len(label_B), model.channels, model.side, model.side),
        label_B.device,
        steps,
        guidance,
        seed,
    )


main = partial(run_application, UnifiedModule, UnifiedData)
