"""DyMoE whose new router rows stay outside the span of earlier tasks' tokens (ours).

LLM hidden states are anisotropic: on the embedded stream, the mean tokens of two tasks have a cosine
similarity of 0.92 to 1.00 at every projection. To a randomly initialised row the tokens of all tasks
therefore look alike, and guidance admits those of the new task and of earlier tasks at the same rate (0.29
and 0.30 at the second task, 0.06 and 0.05 at the sixth). What distinguishes tasks lies outside the few
directions that an earlier task's tokens share.

Shapes: T tokens, D inputs of a projection, E experts of the new bank, O directions of earlier tasks.
"""

from typing import Any

import torch
from torch import Tensor, nn

from unimoe.continual.stream import Experience
from unimoe.continual.subspace import Subspace, outside

from .dymoe import DyMoE


class DyMoEApart(DyMoE):
    """DyMoE, and at every projection

    1. after a task: the principal directions of its tokens are added to an orthonormal basis
    2. before the next task: its new rows are initialised around the part of its mean token outside that basis
    3. at every step: what the optimizer added inside the basis is removed from the new rows

    so that the cosine of an old token with a new row stays near zero whatever is learned. O-LoRA projects the
    adapters' A in this way and SAME the router gradients (arXiv 2602.01990); here it is the rows.
    """

    name = "dymoe_apart"

    def __init__(self, energy: float = 0.9, samples: int = 32, **dymoe: Any):
        """
        Args:
            energy: fraction of the squared length of a task's tokens that the basis covers, at every
                projection: more retains more of earlier tasks and leaves less room for new ones.
            samples: samples of each task, whose tokens the directions are computed from.
            dymoe: the parameters of DyMoE.
        """
        super().__init__(**dymoe)
        self.subspace = Subspace(energy, samples)

    @torch.no_grad()
    def before_training_exp(self, task: Experience) -> None:
        super().before_training_exp(task)
        if self._basis():
            for name, tokens_TD in self.subspace.tokens(self.learner, task).items():
                basis_OD, row_ED = self._basis()[name], self.routers()[name].rows[-1]
                own_D = nn.functional.normalize(outside(tokens_TD.mean(0), basis_OD), dim=0)
                row_ED.copy_(own_D + nn.functional.normalize(outside(row_ED, basis_OD), dim=-1))

    def before_training_iteration(self) -> None:
        self._project()

    @torch.no_grad()
    def after_training_exp(self, task: Experience) -> None:
        super().after_training_exp(task)
        self._project()
        self.memory["basis"] = self.subspace.grown(self._basis(), self.learner, task)

    def _basis(self) -> dict[str, Tensor]:
        """[O, D] by projection, orthonormal rows."""
        return self.memory.get("basis", {})

    @torch.no_grad()
    def _project(self) -> None:
        """Remove the part of the newest rows that lies inside the basis."""
        routers = self.routers()
        for name, basis_OD in self._basis().items():
            row_ED = routers[name].rows[-1]
            row_ED.copy_(outside(row_ED, basis_OD))
