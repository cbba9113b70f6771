"""The router part of SAME (arXiv 2602.01990), on a fixed mixture of LoRA experts.

Shapes: D inputs of a projection, E experts, O directions of earlier tasks.
"""

import torch
from torch import Tensor

from unimoe.continual.router import SoftmaxRouter
from unimoe.continual.stream import Experience
from unimoe.continual.subspace import Subspace, outside

from .moelora import MoELoRA


class SameRouter(MoELoRA):
    """MoELoRA whose routers learn later tasks outside the principal directions of earlier tasks' tokens, so
    that an old token keeps its experts, whatever these learn.

    The change of the weights is projected after the optimizer's step: AdamW would rotate a projected gradient
    out of the complement. SAME's other parts (gradients rescaled inside the directions, preconditioned
    experts, experts that freeze) are not implemented.
    """

    name = "same_router"

    def __init__(self, energy: float = 0.9, samples: int = 32):
        """
        Args:
            energy: fraction of the squared length of a task's tokens that is protected from the router.
            samples: samples of each task, whose tokens the directions are computed from.
        """
        super().__init__()
        self.subspace = Subspace(energy, samples)

    @torch.no_grad()
    def before_training_exp(self, task: Experience) -> None:
        self.memory["before"] = {name: weight_ED.clone() for name, weight_ED in self._weights().items()}

    def before_training_iteration(self) -> None:
        self._project()

    def after_training_exp(self, task: Experience) -> None:
        self._project()
        del self.memory["before"]
        self.memory["basis"] = self.subspace.grown(self._basis(), self.learner, task)

    def _basis(self) -> dict[str, Tensor]:
        """[O, D] by projection, orthonormal rows."""
        return self.memory.get("basis", {})

    def _weights(self) -> dict[str, Tensor]:
        """[E, D] weight of the router of each projection."""
        return {
            name: layer.router.weight
            for name, layer in self.learner.layers.items()
            if isinstance(layer.router, SoftmaxRouter)
        }

    @torch.no_grad()
    def _project(self) -> None:
        """Remove the part of this task's change that lies inside the basis."""
        weights = self._weights()
        for name, basis_OD in self._basis().items():
            weight_ED, before_ED = weights[name], self.memory["before"][name]
            weight_ED.copy_(before_ED + outside(weight_ED - before_ED, basis_OD))
