"""A fixed mixture of LoRA experts."""

from torch import nn

from unimoe.continual.learner import Learner
from unimoe.continual.router import SoftmaxGate
from unimoe.continual.stream import Experience

from .base import Strategy


class MoELoRA(Strategy):
    """One bank of experts under a dense softmax router, all trained on every task (CoIN, arXiv 2403.08350).

    A starts from N(0, 0.01^2), as there. The softmax begins near 1 / E, so that an expert's effective scale
    begins E times below that of a plain LoRA.
    """

    name = "moelora"

    def attach(self, learner: Learner) -> None:
        super().attach(learner)
        for layer in learner.layers.values():
            layer.gating = SoftmaxGate(layer.in_features, learner.config.experts).to(layer.weight.device)

    def grow(self, index: int) -> None:
        if index == 0:
            self.learner.grow_experts()
            for layer in self.learner.layers.values():
                nn.init.normal_(layer.banks[0].A, std=0.01)  # type: ignore[arg-type]

    def begin(self, task: Experience) -> None:
        super().begin(task)
        for layer in self.learner.layers.values():
            layer.gating.requires_grad_(True)  # type: ignore[union-attr]
