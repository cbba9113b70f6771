"""The LightningModule of detection: base training, MoE-Tuning and the dense control.

Shapes: B images, L text tokens, W width of the text encoder.
"""

import logging
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from unimoe.analysis.routing_stats import load_columns
from unimoe.detection.data.batches import EvalBatch, TrainBatch
from unimoe.detection.data.datamodule import DetectionData
from unimoe.detection.evaluation.average_precision import Evaluation, Style
from unimoe.detection.evaluation.evaluator import DetectionEvaluator
from unimoe.detection.evaluation.expert_usage import (
    coactivation,
    effective_partners,
    in_columns,
    slices_of,
    twin_share,
    visited_experts,
)
from unimoe.detection.model.build import build_detector
from unimoe.detection.model.criterion import CriterionConfig, DetectionCriterion
from unimoe.detection.model.denoising import DenoisingConfig, make_denoising
from unimoe.detection.model.loading import load_detector
from unimoe.detection.model.modeling import DynamicDinoForObjectDetection
from unimoe.detection.model.moe_tuning import freeze_for_tuning, moe_tuning
from unimoe.detection.model.text_cache import TextFeatureCache
from unimoe.errors import UserError
from unimoe.moe import LayerRecord, expert_load, load_balance, record
from unimoe.training.module import ResumableModule, Schedule, check_compressed, check_trainable
from unimoe.training.ranks import (
    across_ranks,
    data_parallel_size,
    expert_load_over_ranks,
    mean_over_ranks,
)
from unimoe.training.sharding import foreach, shard

log = logging.getLogger(__name__)


@dataclass
class MoETuningConfig:
    """How a dense detector becomes a mixture of experts (:mod:`unimoe.detection.model.moe_tuning`)."""

    copies: int = 8
    """Copies of each decoder FFN."""
    slices: int = 2
    """Parts of each copy, and experts that a query visits."""
    gate: str = "straight_through"
    """indicator, renorm_k or straight_through."""
    balance_coef: float = 0.01
    """Factor of the load-balance loss."""
    router_init_std: float = 0.02
    """Standard deviation of the router's fresh rows."""
    router: dict[str, Any] | None = None
    """More settings of the ``top_k`` router, see ``unimoe moe show top_k``."""


@dataclass
class StartConfig:
    """The model before training."""

    init_from: str | None = None
    """Folder of an earlier run, or public Grounding DINO weights; or else give ``detector``."""
    detector: dict[str, Any] | None = None
    """Detector of a fresh start: ``backbone``, ``weights``, ``text_encoder`` and fields of DynamicDinoConfig,
    as :func:`unimoe.detection.model.build.build_detector` takes them."""
    moe: MoETuningConfig | None = None
    """Turns the decoder's FFNs into experts and freezes what the paper freezes."""


@dataclass
class TrainableConfig:
    """The weights that train."""

    trainable: list[str] | None = None
    """Shell patterns of the parameters that train (default: all, or what MoE-Tuning trains)."""
    freeze_encoders: bool = True
    """Keep backbone and text encoder as they are."""


@dataclass
class OptimizerConfig:
    """AdamW and its learning rates."""

    lr: float = 4e-4
    """Peak learning rate."""
    encoder_lr: float = 0.1
    """Learning rate of backbone and text encoder, as a share of ``lr``."""
    schedule: Schedule = "cosine"
    """Course of the learning rates after warm-up."""
    warmup: float = 0.1
    """Share of all steps over which the learning rates rise linearly from zero."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW, on matrices only."""


@dataclass
class DetectionConfig(OptimizerConfig, TrainableConfig, StartConfig):
    """Settings of :class:`DetectionModule`, the keys under ``model:``."""

    criterion: CriterionConfig | None = None
    """Weights of the losses and of the matching."""
    denoising: DenoisingConfig | None = None
    """Extra queries of a training step (``queries: 0`` for none)."""
    evaluation: Style = "coco"
    """Protocol of the average precision."""
    max_detections: int = 300
    """Detections of an image for each prompt that count for the average precision, at most."""
    seed: int = 0
    """Seed of everything random; each step depends on it and on the step's number alone."""


class DetectionModule(ResumableModule):
    """Trains a detector on boxes and names.

    The training step:

    1. maps of the backbone and features of the text encoder, from their caches where they are frozen
    2. denoising queries around the objects
    3. the criterion over all decoder layers, the proposals and the denoising queries, plus the balance loss
    """

    batch_unit = "images"

    def __init__(self, **settings: Any):
        """
        Args:
            settings: the fields of :class:`DetectionConfig`.

        Raises:
            UserError: not exactly one of ``init_from`` and ``detector`` is given.
        """
        super().__init__()
        self.config = config = DetectionConfig(**settings)
        if (config.init_from is None) == (config.detector is None):
            raise UserError(
                "a run starts from one of model.init_from (a folder) and model.detector (a fresh start)"
            )
        self.schedule, self.warmup, self.seed = config.schedule, config.warmup, config.seed
        self.criterion = DetectionCriterion(config.criterion)
        self.denoising = config.denoising or DenoisingConfig()
        self.model: DynamicDinoForObjectDetection
        self.tokenizer: PreTrainedTokenizerBase
        self.evaluator: DetectionEvaluator
        """Evaluator of the latest evaluation, with every detection."""
        self.scores: Evaluation
        """Scores of the latest evaluation."""
        self._text: TextFeatureCache | None = None

    # ---------------------------------------------------------------- building

    def configure_model(self) -> None:
        """Build the model and choose what trains, once; Lightning calls this before every verb.

        Raises:
            UserError: the model cannot be built or loaded, nothing would train, or the run is in half
                precision.
        """
        if hasattr(self, "model"):
            return
        config = self.config
        training = self._trainer is None or self.trainer.training
        if training and self._trainer is not None:
            check_precision(self.trainer.precision)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            if config.init_from is not None:
                model, tokenizer = load_detector(config.init_from, "init_from")
            else:
                model, tokenizer = build_detector(**(config.detector or {}))
            if config.moe is not None:
                moe_tuning(model, **vars(config.moe))
        if training:
            check_compressed(model, ["*"] if config.trainable is None else config.trainable)
        if config.trainable is not None:
            freeze_for_tuning(model, tuple(config.trainable))
        if config.freeze_encoders:
            model.freeze_encoders()
        if not training:
            model.requires_grad_(False)
        elif not any(parameter.requires_grad for parameter in model.parameters()):
            raise UserError(
                f"nothing trains: model.trainable is {config.trainable}, and model.freeze_encoders "
                f"({str(config.freeze_encoders).lower()}) freezes what begins with backbone. or text_encoder."
            )
        else:
            check_trainable(model, config.trainable or [], "model.freeze_encoders")
        self.model, self.tokenizer = model.train(), tokenizer
        if not any(p.requires_grad for p in model.text_encoder.parameters()):
            self._text = TextFeatureCache(model)
        if self.device_mesh is not None and self.trainer.training:
            shard(self, *self.blocks())

    def blocks(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """The modules that FSDP2 shards one by one, and those it leaves whole: frozen encoders, which run
        outside of steps too."""
        encoders: list[nn.Module] = [self.model.backbone, self.model.text_encoder]
        frozen = [part for part in encoders if not any(p.requires_grad for p in part.parameters())]
        return [*self.model.enhancer.layers, *self.model.decoder.layers], frozen

    def configure_optimizers(self) -> Any:
        """AdamW with four parameter groups: matrices and vectors, of the encoders and of the rest."""
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                encoder = name.startswith(("backbone.", "text_encoder."))
                groups.setdefault((encoder, parameter.ndim > 1), []).append(parameter)
        settings = [
            {
                "params": parameters,
                "lr": self.config.lr * (self.config.encoder_lr if encoder else 1.0),
                "weight_decay": self.config.weight_decay if matrix else 0.0,
            }
            for (encoder, matrix), parameters in groups.items()
        ]
        return self.scheduled(torch.optim.AdamW(settings, foreach=foreach(self.device_mesh)))

    def on_fit_start(self) -> None:
        """Log how much trains."""
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.model.parameters())
        log.info("trains %.2f of %.2f million weights", trained / 1e6, total / 1e6)

    # ---------------------------------------------------------------- steps

    def batch_amount(self, batch: TrainBatch) -> float:
        """Images of a batch, for the speed in the progress."""
        return len(batch.targets)

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        # (1)
        prompts = batch.prompt_batch
        features = None if self._text is None else self._text(batch.prompts)
        # (2)
        queries = make_denoising(batch.targets, prompts.name_tokens, self.denoising)
        with record() as records:
            output = self.model(
                pixel_values=batch.pixel_values,
                pixel_mask=batch.pixel_mask,
                image_features=batch.image_features,
                text_features=features,
                denoising=queries,
                **prompts.inputs(),
            )
        self.count_load(records)
        # (3)
        labels = queries.labels if queries else None
        losses = self.criterion(output, batch.targets, prompts.name_tokens, labels)
        if self.denoising.queries:  # no object in any image of this rank
            losses.setdefault("denoising", torch.zeros_like(losses["loss"]))
        shown = mean_over_ranks(torch.stack(list(losses.values())).detach())
        self.log("train/loss", shown[0], prog_bar=True, logger=False)
        row = {f"train/{name}": value for name, value in zip(losses, shown.tolist(), strict=True)}
        row["lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        speed = self.speed(self.batch_amount(batch) * data_parallel_size(self.trainer))
        self.log_row({**row, **speed, **self._expert_use(records)}, batch_idx)
        return losses["loss"]

    @torch.no_grad()
    def _expert_use(self, records: list[LayerRecord]) -> dict[str, float]:
        """Columns on the load of each layer's experts in a step, over all ranks."""
        if not records:
            return {}
        visits_LQE = in_columns([visited_experts(entry) for entry in records], self.model)
        loads = expert_load_over_ranks([expert_load(entry) for entry in records])
        together_LEE = mean_over_ranks(coactivation(visits_LQE)) * data_parallel_size(self.trainer)
        balance_L = load_balance(records, across=across_ranks)
        row = load_columns(records, loads, balance_L)
        partners_L = effective_partners(together_LEE)
        twins_L = twin_share(together_LEE, slices_of(self.model))
        for entry, partners, twins in zip(records, partners_L.tolist(), twins_L.tolist(), strict=True):
            name = f"moe/layer{entry.layer:02d}"
            row |= {f"{name}/effective_partners": partners, f"{name}/twins": twins}
        return row

    # ---------------------------------------------------------------- average precision

    def on_validation_epoch_start(self) -> None:
        self.evaluator = self._evaluator("val")

    def on_test_epoch_start(self) -> None:
        self.evaluator = self._evaluator("test")

    def _evaluator(self, split: str) -> DetectionEvaluator:
        data = cast(DetectionData, cast(Any, self.trainer).datamodule).sets[split]
        style, top = self.config.evaluation, self.config.max_detections
        return DetectionEvaluator(self.model, self.tokenizer, data, style, top=top, text=self._text)

    def validation_step(self, batch: EvalBatch, batch_idx: int) -> None:
        self.evaluator.update(batch)

    def test_step(self, batch: EvalBatch, batch_idx: int) -> None:
        self.evaluator.update(batch)

    def on_validation_epoch_end(self) -> None:
        self._score("val")

    def on_test_epoch_end(self) -> None:
        self._score("test")

    def _score(self, split: str) -> None:
        self.scores = self.evaluator.compute()
        metrics = {f"{split}/{name}": value for name, value in self.scores.metrics.items()}
        self.log_dict(metrics, rank_zero_only=False)


def check_precision(precision: str) -> None:
    """Refuse weights in half precision, before the first step.

    Positions in an image and box corners are counted in the precision of the weights, and bfloat16 has eight
    bits: it cannot tell pixel 1000 from pixel 1003.

    Raises:
        UserError: ``precision``, as Lightning names it, stores the weights in half precision.
    """
    if precision.endswith("-true") and precision not in ("32-true", "64-true"):
        raise UserError(
            f"trainer.precision {precision} rounds boxes to a few pixels; set bf16-mixed, 16-mixed or 32-true"
        )
