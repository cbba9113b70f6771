"""A fixed mixture of LoRA experts."""

from torch import nn

from unimoe.continual.learner import Learner
from unimoe.continual.router import SoftmaxRouter

from .base import Strategy


class MoELoRA(Strategy):
    """One bank of experts under a dense softmax router, all trained on every task (CoIN, arXiv 2403.08350).

    A is initialised from N(0, 0.01^2), as in CoIN. The softmax starts near 1 / E, so the effective scale of
    an expert starts E times below that of a plain LoRA.
    """

    name = "moelora"

    def attach(self, learner: Learner) -> None:
        super().attach(learner)
        for layer in learner.layers.values():
            layer.router = SoftmaxRouter(layer.in_features, learner.config.experts).to(layer.weight.device)

    def model_adaptation(self, index: int) -> None:
        if index == 0:
            for bank in self.learner.add_experts():
                nn.init.normal_(bank.A, std=0.01)
