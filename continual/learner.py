"""The model that learns: a frozen base with adapters on its decoder, and what strategies ask of it.

Shapes: B rows, T tokens of a row.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from unimoe.data import Collator, FeatureCache, Sample
from unimoe.encoders import Encoder
from unimoe.errors import UserError
from unimoe.model.modeling import UniMoeForConditionalGeneration
from unimoe.model.processing import UniMoeProcessor
from unimoe.model.utils import to_device
from unimoe.moe.lora_linear import PROJECTIONS, AdaptedLinear, adapt, adapter_size, plain_rank

log = logging.getLogger(__name__)


@dataclass
class AdapterConfig:
    """Size and place of what each task may train: the same budget for every strategy."""

    experts: int = 16
    """Experts of a bank."""
    rank: int = 4
    """Rank of each expert; a plain LoRA gets the rank that has as many weights as a routed bank."""
    alpha: float = 128.0
    """The update is scaled by alpha / (experts * rank) (128 / 64 in DyMoE's port; upstream's is not
    confirmed)."""
    targets: list[str] = field(default_factory=lambda: list(PROJECTIONS))
    """Names of linear layers in the decoder's blocks, or glob patterns."""
    layers: list[int] | None = None
    """Indices of the blocks to adapt; None adapts all."""

    @property
    def scale(self) -> float:
        return self.alpha / (self.experts * self.rank)


class Learner:
    """Base model, processor, adapters and feature cache of one run."""

    def __init__(
        self,
        model: UniMoeForConditionalGeneration,
        processor: UniMoeProcessor,
        config: AdapterConfig,
        features: str | Path | None = None,
        max_length: int | None = None,
    ):
        """``features`` is the folder in which the frozen encoders' outputs are kept; None encodes each
        time."""
        if config.experts < 1 or config.rank < 1:
            raise UserError(
                f"adapters need experts and rank of at least 1, found {config.experts}, {config.rank}"
            )
        self.model, self.processor, self.config = model, processor, config
        model.requires_grad_(False).eval()  # nothing of the base has a training mode that we want
        self.decoder: nn.Module = model.model.language_model
        self.layers: dict[str, AdaptedLinear] = adapt(
            self.decoder, config.targets, config.layers, config.scale
        )
        self.recomputes = False
        self.divided = False
        """Whether processes share the base, and must run it together."""
        self.features: FeatureCache | None = None
        if features is not None and len(model.model.encoders):
            towers: dict[str, Encoder] = dict(model.model.encoders.items())  # type: ignore[arg-type]
            self.features = FeatureCache(features, processor, towers)
        self.collator = Collator(processor, max_length, self.features)

    def divide(self, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
        """Keep this process's share of the base's blocks, which gather their weights when they run (FSDP2).
        Adapters, which come later, and all outside the blocks stay whole on every process."""
        for block in self.decoder.layers:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(self.decoder, mesh=mesh, ignored_params=set(self.decoder.parameters()))
        self.divided = True

    # ---------------------------------------------------------------- adapters

    def budget(self) -> int:
        """Weights that each task may train: a routed bank on every adapted layer."""
        size = (self.config.experts, self.config.rank)
        return sum(adapter_size(layer, *size, routed=True) for layer in self.layers.values())

    def grow_plain(self) -> None:
        """One more plain LoRA of the budget on every layer."""
        for layer in self.layers.values():
            layer.grow(1, plain_rank(layer, self.config.experts, self.config.rank))

    def grow_experts(self) -> None:
        """One more bank of the budget's experts on every layer; its router is the strategy's affair."""
        for layer in self.layers.values():
            layer.grow(self.config.experts, self.config.rank)

    def adapters(self) -> dict[str, nn.Parameter]:
        """Every parameter of banks and routers by name."""
        return {
            f"{name}.{inner}": parameter
            for name, layer in self.layers.items()
            for inner, parameter in layer.named_parameters()
            if not inner.startswith("base.")
        }

    def trainable(self) -> dict[str, nn.Parameter]:
        """Those of them that train now."""
        return {name: p for name, p in self.adapters().items() if p.requires_grad}

    def freeze_banks(self, but: int | None = None) -> None:
        """Freeze every bank and router row of every layer, except those of bank ``but`` (-1: the newest)."""
        for layer in self.layers.values():
            layer.banks.requires_grad_(False)
            rows = getattr(layer.gating, "rows", None)
            if rows is not None:
                rows.requires_grad_(False)
            if but is not None:
                layer.banks[but].requires_grad_(True)
                if rows is not None:
                    rows[but].requires_grad_(True)

    def check_budget(self, tolerance: float = 0.02) -> int:
        """The number of weights that train now. Raises UserError when it is off the budget."""
        found, budget = sum(p.numel() for p in self.trainable().values()), self.budget()
        if abs(found / budget - 1) > tolerance:
            raise UserError(
                f"{found:,} weights train, but the budget of each task is {budget:,}, and strategies of "
                "unequal budgets cannot be compared; is adapters.rank too small to be divided evenly?"
            )
        return found

    # ---------------------------------------------------------------- data

    @property
    def device(self) -> torch.device:
        return self.model.device

    def collate(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """Batches of rows of like length; one batch where layers run again in the backward pass, so that what
        the routers know about padding is that of the same rows."""
        parts = [self.collator(samples)] if self.recomputes else self.collator.bucket_by_length(samples)
        return [to_device(part, self.device) for part in parts]

    def recompute(self, on: bool) -> None:
        """Gradient checkpointing: blocks run again in the backward pass (never in the reentrant form, which
        loses what routers add to the loss)."""
        if on == self.recomputes:
            return
        self.recomputes = on
        if on:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()
        for block in self.decoder.modules():
            if hasattr(block, "gradient_checkpointing"):
                block.training = on  # blocks recompute in training mode only; their parts stay as they are


def valid_tokens(part: dict[str, Any]) -> Tensor | None:
    """[B * T] bool, False on padding; None when there is none."""
    mask = part.get("attention_mask")
    return None if mask is None or bool(mask.all()) else mask.flatten().bool()
