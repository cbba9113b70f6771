"""LLaVA-DyMoE (arXiv 2603.27481), and IncMoELoRA, which is DyMoE with both of its parts off."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from unimoe.continual.guidance import TYPES, GuidanceConfig, Guide
from unimoe.continual.learner import Learner
from unimoe.continual.router import CosineTopK
from unimoe.continual.routing_log import by_block, over_ranks
from unimoe.continual.stream import Experience
from unimoe.model.inputs import Batch
from unimoe.moe import LayerRecord, record
from unimoe.training.ranks import rank_weighted

from .base import Strategy


class IncMoELoRA(Strategy):
    """A new bank of experts and router rows per task, top-k over all banks; old banks and rows are frozen."""

    name = "incmoelora"
    routed = True
    shares_adapters = False

    def __init__(self, k: int | None = None, scale: float = 1.0, temperature: float = 0.01):
        """
        Args:
            k: experts that a token keeps out of all banks (default: the size of a bank, as in the paper).
            scale: gamma, the factor on the cosines.
            temperature: temperature of the softmax over the kept experts.
        """
        super().__init__()
        self.k, self.scale, self.temperature = k, scale, temperature
        self.guide = Guide(GuidanceConfig(assign=False, exclusivity=0.0, specialization=0.0))

    def attach(self, learner: Learner) -> None:
        super().attach(learner)
        for layer in learner.layers.values():
            router = CosineTopK(layer.in_features, self._kept, self.scale, self.temperature, self.guide)
            layer.router = router.to(layer.weight.device)

    def model_adaptation(self, index: int) -> None:
        self.learner.add_experts()
        for router in self.routers().values():
            router.add_rows(self.learner.config.experts)

    def before_training_exp(self, task: Experience) -> None:
        self.guide.start(guided=task.index > 0)

    def loss(self, batch: list[Batch], step: int, steps: int) -> Tensor:
        """Cross-entropy plus the guide's losses, which are means over routers and tokens."""
        self.guide.step, self.guide.steps = step, steps
        if not self.guide.has_loss:
            return super().loss(batch, step, steps)
        with record() as records:
            loss = super().loss(batch, step, steps)
        routing = self.guide.loss(_of_banks(records), sum(self._sizes[:-1]), self._kept, self.temperature)
        return loss + rank_weighted(*routing)

    def after_training_exp(self, task: Experience) -> None:
        self.guide.guided = False

    def routing(self, records: Sequence[LayerRecord]) -> dict[str, Any]:
        """Shares of token types, target of the losses and mass of each bank, by block of the decoder and over
        all processes."""
        seen = self.guide.observe(_of_banks(records), self._sizes, self._kept)
        return by_block(over_ranks(seen, self.learner.device), TYPES)

    def routers(self) -> dict[str, CosineTopK]:
        """The router of each projection."""
        return {
            name: layer.router
            for name, layer in self.learner.layers.items()
            if isinstance(layer.router, CosineTopK)
        }

    @property
    def _kept(self) -> int:
        return self.learner.config.experts if self.k is None else self.k

    @property
    def _sizes(self) -> list[int]:
        """Experts of each bank, the same at all projections."""
        return next(iter(self.routers().values())).sizes


class DyMoE(IncMoELoRA):
    """IncMoELoRA with token assignment guidance and the routing-score losses (guidance.py)."""

    name = "dymoe"
    guided = True

    def __init__(self, guidance: GuidanceConfig | None = None, **routing: Any):
        """
        Args:
            guidance: the two parts and their switches.
            routing: the parameters of IncMoELoRA.
        """
        super().__init__(**routing)
        self.guide.config = guidance or GuidanceConfig()


def _of_banks(records: Sequence[LayerRecord]) -> list[LayerRecord]:
    """Records without those of MoE layers of the base model."""
    return [entry for entry in records if entry.projection]
