"""The model that learns: a frozen base with adapters on its decoder.

Shapes: B rows, T tokens of a row.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from unimoe.data import Collator, FeatureCache, HostFeatures, Sample, open_feature_cache
from unimoe.errors import UserError
from unimoe.model.host import find_decoder
from unimoe.model.inputs import Batch
from unimoe.model.modeling import UniMoeForConditionalGeneration
from unimoe.model.processing import UniMoeProcessor
from unimoe.model.utils import to_device
from unimoe.moe.adapt import PROJECTIONS, adapt
from unimoe.moe.lora_linear import LoRABank, LoRALinear, adapter_size, plain_rank

from .router import CosineTopK

log = logging.getLogger(__name__)
TOLERANCE = 0.02
"""Share of the budget by which a strategy may miss it."""


@dataclass
class AdapterConfig:
    """Size and place of the adapters: the same budget of trained weights per task for every strategy."""

    experts: int = 16
    """Experts of a bank."""
    rank: int = 4
    """Rank of each expert; a plain LoRA gets the rank at which it has as many weights as a routed bank."""
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
        """``features`` is the folder of the cached outputs of the frozen encoders; None encodes each time.

        Raises:
            UserError: for fewer than one expert, or adapters that match no layer.
        """
        if config.experts < 1 or config.rank < 1:
            raise UserError(
                f"adapters need experts and rank of at least 1, found {config.experts}, {config.rank}"
            )
        self.model, self.processor, self.config = model, processor, config
        model.requires_grad_(False).eval()  # dropout and the like of the base stay off
        self.decoder: nn.Module = find_decoder(model)
        self.layers: dict[str, LoRALinear] = adapt(self.decoder, config.targets, config.layers, config.scale)
        self.recomputes = False
        self.divided = False
        """Whether the base is sharded over processes, which must then run it together."""
        self.features: FeatureCache | HostFeatures | None = None
        if features is not None and processor.modalities:
            self.features = open_feature_cache(model, processor, features, "model.features")
        self.collator = Collator(processor, max_length, self.features)

    def divide(self, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
        """Shard the blocks of the base over the processes (FSDP2). Adapters, which are added later, and
        everything outside the blocks are replicated."""
        for block in self.decoder.layers:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(self.decoder, mesh=mesh, ignored_params=set(self.decoder.parameters()))
        self.divided = True

    # ---------------------------------------------------------------- adapters

    def budget(self) -> int:
        """Weights that each task may train: a routed bank on every adapted layer."""
        size = (self.config.experts, self.config.rank)
        return sum(adapter_size(layer, *size, routed=True) for layer in self.layers.values())

    def add_lora(self) -> None:
        """Add a plain LoRA of the budget to every layer."""
        for layer in self.layers.values():
            layer.add_bank(1, plain_rank(layer, self.config.experts, self.config.rank))

    def add_experts(self) -> list[LoRABank]:
        """Add a bank of the budget's experts to every layer; their router belongs to the strategy."""
        return [layer.add_bank(self.config.experts, self.config.rank) for layer in self.layers.values()]

    def adapters(self) -> dict[str, nn.Parameter]:
        """Every parameter of banks and routers, by name."""
        return {
            f"{name}.{inner}": parameter
            for name, layer in self.layers.items()
            for inner, parameter in layer.named_parameters()
            if not inner.startswith("base.")
        }

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that are trainable now."""
        return {name: p for name, p in self.adapters().items() if p.requires_grad}

    def train_bank(self, index: int | None) -> None:
        """Freeze all adapters except bank ``index`` (-1: the newest) and its router; None freezes all."""
        for layer in self.layers.values():
            layer.requires_grad_(False)
            if index is None:
                continue
            layer.lora_banks[index].requires_grad_(True)
            if isinstance(layer.router, CosineTopK):
                layer.router.rows[index].requires_grad_(True)
            elif layer.router is not None:
                layer.router.requires_grad_(True)

    def check_budget(self) -> int:
        """Number of weights that are trainable now.

        Raises:
            UserError: if it differs from the budget by more than 2 %.
        """
        found, budget = sum(p.numel() for p in self.trainable().values()), self.budget()
        if abs(found / budget - 1) > TOLERANCE:
            raise UserError(
                f"{found:,} weights are trained, but the budget of each task is {budget:,}; strategies with "
                "different budgets cannot be compared; is adapters.rank too small to be divided evenly?"
            )
        return found

    # ---------------------------------------------------------------- data

    @property
    def device(self) -> torch.device:
        return self.model.device

    def collate(self, samples: Sequence[Sample]) -> list[Batch]:
        """Batches of rows of similar length, on the model's device; one batch if the base is divided, whose
        blocks must run equally often on every process."""
        parts = [self.collator(samples)] if self.divided else self.collator.bucket_by_length(samples)
        return [to_device(part, self.device) for part in parts]

    def recompute(self, on: bool) -> None:
        """Switch gradient checkpointing; routers see the same context in both runs of a block."""
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


def current_names(state: dict[str, Any]) -> dict[str, Any]:
    """A saved state under today's names: until version 0.2 routers were called ``gating``."""
    return {name.replace(".gating.", ".router."): value for name, value in state.items()}
