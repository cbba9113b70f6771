"""Trains a diffusion transformer, and measures its held-out loss and how its experts divide the classes.

Shapes: B images of a batch, G of all ranks' batches.
"""

from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from unimoe.applications.labelled_images import Batch, LabelledImages
from unimoe.applications.process import PROCESSES, Process, ProcessName, draw_each
from unimoe.applications.visits import label_expert_information, live_experts, visits
from unimoe.errors import UserError
from unimoe.moe import record
from unimoe.training.application import ApplicationConfig, ApplicationModule, run_application
from unimoe.training.ranks import rank_weighted
from unimoe.training.weight_average import WeightAverage

from .data import DiffusionData
from .dit import DiT, DiTConfig
from .probe import LinearProbe, pretrained_features
from .sample import draw, write_samples
from .usage import overlap_by_distance


@dataclass
class DiffusionConfig(ApplicationConfig):
    """Settings of :class:`DiffusionModule`, the keys under ``model:``."""

    dit: DiTConfig = field(default_factory=DiTConfig)
    """The transformer."""
    process: ProcessName = "flow"
    """``flow`` (rectified flow) or ``ddpm``."""
    drop: float = 0.1
    """Share of training images without their label, for guidance."""
    ema: float = 0.999
    """Decay of the averaged weights, which are evaluated and saved."""
    samples: int = 0
    """Samples of each class of sprites, drawn by ``unimoe test`` into a sheet; a linear probe on
    EfficientNet-Lite0 says how many it recognises."""
    guidance: float = 3.0
    """Guidance scale of these samples; 1 is no guidance."""


class DiffusionModule(ApplicationModule):
    """Mean squared error of the prediction, plus the auxiliary losses of the design.

    The training step:

    1. times, noise and dropped labels, by the step's number and the place in the batch of all ranks
    2. the prediction at those times, and its error
    3. the auxiliary losses over the recorded routing
    """

    application = "diffusion"
    build = staticmethod(DiT.of)
    batch_unit = "images"
    config: DiffusionConfig
    model: DiT

    def __init__(self, **settings: Any):
        """
        Args:
            settings: the fields of :class:`DiffusionConfig`.

        Raises:
            UserError: a share or the number of samples is out of range.
        """
        config = DiffusionConfig(**settings)
        super().__init__(config)
        if not 0 <= config.drop < 1 or not 0 <= config.ema < 1:
            raise UserError(f"model.drop and ema are {config.drop} and {config.ema}, expected 0 to below 1")
        if config.samples < 0:
            raise UserError(f"model.samples is {config.samples}, expected at least 0")
        self.process: Process
        """Process that the network is or was trained for."""
        self.average: WeightAverage

    def network_settings(self, data: DiffusionData) -> dict[str, Any]:
        about = {"classes": data.classes, "shape": list(data.shape), "text": data.text}
        return {"data": about, "dit": asdict(self.config.dit.resolved()), "process": self.config.process}

    def configure_model(self) -> None:
        super().configure_model()
        self.process = PROCESSES[self.network["process"]]()
        if not hasattr(self, "average"):
            self.average = WeightAverage(self.model, self.config.ema)

    def checkpoint_names(self) -> set[str]:
        return super().checkpoint_names() | {f"average.{name}" for name in self.average.state_dict()}

    def save(self, folder: Path) -> None:
        """The averaged weights."""
        with self.average.applied(self.model):
            super().save(folder)

    # ---------------------------------------------------------------- training

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        # (1)
        seeds = self.sample_seeds(len(batch.images), batch_idx)
        time_B, noise, drop_B = draw_each(self.process, batch.images, seeds)
        label_B = torch.where(drop_B < self.config.drop, -1, batch.labels)
        # (2)
        x, target = self.process.corrupt(batch.images, noise, time_B)
        with record() as records:
            prediction = self.model(x, time_B, label_B, batch.texts)
        error = rank_weighted((prediction - target).square().mean(), len(x))
        # (3)
        auxiliary = self.auxiliary(records)
        self.log_step({"loss": error + auxiliary, "error": error, "auxiliary": auxiliary}, len(x), batch_idx)
        return error + auxiliary

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.average.update(self.model, self.trainer.global_step + 1)  # this step is counted afterwards

    # ---------------------------------------------------------------- evaluation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Each image at one time with one noise, which follow from its number."""
        time_B, noise, _ = draw_each(self.process, batch.images, batch.index.tolist())
        x, target = self.process.corrupt(batch.images, noise, time_B)
        with self.average.applied(self.model), record() as records:
            prediction = self.model(x, time_B, batch.labels, batch.texts)
        error_B = (prediction - target).square().flatten(1).mean(dim=1)
        self.keep(batch.index, error_B, time_B, batch.labels, visits(records, len(x)))

    def report(self, split: str) -> None:
        error_N, time_N, label_N, visits_NLE = self.kept()
        quarters = (time_N * 4).long().clamp(max=3)
        beside: dict[str, Any] = {
            "images": len(error_N),
            "loss_by_time": {
                f"{q / 4:.2f}..{(q + 1) / 4:.2f}": float(error_N[quarters == q].mean())
                for q in range(4)
                if (quarters == q).any()
            },
        }
        scores = {"loss": float(error_N.mean())}
        if visits_NLE.numel():
            information = label_expert_information(visits_NLE, label_N)
            alive = live_experts(visits_NLE)
            scores |= {
                "class_expert_information": sum(information) / len(information),
                "live_experts": sum(alive) / len(alive),
            }
            beside |= {"class_expert_information": information, "live_experts": alive}  # of each layer
            beside["overlap_by_time_distance"] = overlap_by_distance(visits_NLE, time_N)
        if split == "test" and self.config.samples:
            beside |= self._recognised()
            scores["probe_accuracy"] = beside["probe_accuracy"]
        self.log_scores(split, scores, **beside)

    def _recognised(self) -> dict[str, float]:
        """Draw samples of each class and ask a probe for their classes; the same on every rank.

        Raises:
            UserError: the data are no images with classes.
        """
        data = cast(DiffusionData, cast(Any, self.trainer).datamodule)
        known, held_out = data.sets["train"], data.sets["test"]
        if not isinstance(known, LabelledImages) or not isinstance(held_out, LabelledImages) or data.text:
            raise UserError("model.samples needs sprites with classes; set it to 0")
        label_B = torch.arange(len(data.classes)).repeat_interleave(self.config.samples)
        with self.average.applied(self.model):
            images = draw(self.model, self.process, label_B, guidance=self.config.guidance, seed=self.seed)
        probe = LinearProbe(pretrained_features(), *known.tensors())
        if self.trainer.is_global_zero:
            write_samples(self.logs / "samples.png", images, self.config.samples)
        return {
            "probe_accuracy": probe.accuracy(images, label_B),
            "probe_accuracy_of_real_images": probe.accuracy(*held_out.tensors()),
            "chance": 1 / len(data.classes),
        }


main = partial(run_application, DiffusionModule, DiffusionData)
