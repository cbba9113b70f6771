"""The router's part of SAME (arXiv 2602.01990), on a fixed mixture of LoRA experts.

Shapes: D inputs of a projection, E experts, O directions of earlier tasks.
"""

from typing import Any

import torch
from torch import Tensor

from unimoe.continual.stream import Experience
from unimoe.continual.subspace import Subspace, outside

from .moelora import MoELoRA


class SameRouter(MoELoRA):
    """MoELoRA whose routers learn later tasks outside of the principal directions of earlier tasks' tokens,
    so that an old token keeps its experts, whatever these learn.

    What a task changes is projected, after the optimizer: AdamW would turn a projected gradient out of the
    complement again. SAME's other parts (gradients rescaled inside the directions, preconditioned experts,
    experts that freeze) are not here.
    """

    name = "same_router"

    def __init__(self, energy: float = 0.9, samples: int = 32):
        """
        Args:
            energy: share of the squared length of a task's tokens that is kept from the router.
            samples: of each task, whose tokens the directions are taken from.
        """
        super().__init__()
        self.subspace = Subspace(energy, samples)

    @torch.no_grad()
    def begin(self, task: Experience) -> None:
        super().begin(task)
        self.memory["before"] = {name: self._router(name).clone() for name in self.learner.layers}

    def loss(self, batch: list[dict[str, Any]], step: int, steps: int) -> Tensor:
        self._keep_out()
        return super().loss(batch, step, steps)

    def end(self, task: Experience) -> None:
        super().end(task)
        self._keep_out()
        del self.memory["before"]
        self.memory["basis"] = self.subspace.grown(self._basis(), self.learner, task)

    def _basis(self) -> dict[str, Tensor]:
        """[O, D] by projection, orthonormal rows."""
        return self.memory.get("basis", {})

    def _router(self, name: str) -> Tensor:
        return self.learner.layers[name].gating.weight  # type: ignore[union-attr, return-value]

    @torch.no_grad()
    def _keep_out(self) -> None:
        for name, basis_OD in self._basis().items():
            router_ED, before_ED = self._router(name), self.memory["before"][name]
            router_ED.copy_(before_ED + outside(router_ED - before_ED, basis_OD))
