"""DyMoE whose new router rows keep out of the span of earlier tasks' tokens (ours).

Tokens of a language model are anisotropic: on the embedded stream the mean tokens of two tasks have a cosine
of 0.92 to 1.00, at every projection. To a row that starts at random the tokens of all tasks therefore look
alike, and guidance admits those of the new task and those of the old ones at one rate (0.29 and 0.30 at the
second task, 0.06 and 0.05 at the sixth). What tells tasks apart lies outside of the few directions that an
earlier task's tokens have in common.

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

    1. after a task: the principal directions of its tokens join an orthonormal basis
    2. before the next: its new rows start around the part of its mean token outside of that basis
    3. at every step: what the optimizer put into the basis is taken out of them again

    so that an old token's cosine with a new row is near zero whatever is learned. The projection is that of
    O-LoRA, there of the adapters' A, and of SAME's router gradients (arXiv 2602.01990), here of the rows.
    """

    name = "dymoe_apart"

    def __init__(self, energy: float = 0.9, samples: int = 32, **dymoe: Any):
        """
        Args:
            energy: share of the squared length of a task's tokens that its directions and those before it
                cover, at every projection: more keeps more of the old, and leaves less room for the new.
            samples: of each task, whose tokens they are taken from.
            dymoe: what DyMoE takes.
        """
        super().__init__(**dymoe)
        self.subspace = Subspace(energy, samples)

    @torch.no_grad()
    def begin(self, task: Experience) -> None:
        super().begin(task)
        if self._basis():
            for name, tokens_TD in self.subspace.tokens(self.learner, task).items():
                basis_OD, row_ED = self._basis()[name], self._rows(name)
                own_D = nn.functional.normalize(outside(tokens_TD.mean(0), basis_OD), dim=0)
                row_ED.copy_(own_D + nn.functional.normalize(outside(row_ED, basis_OD), dim=-1))

    def loss(self, batch: list[dict[str, Any]], step: int, steps: int) -> Tensor:
        self._keep_out()
        return super().loss(batch, step, steps)

    @torch.no_grad()
    def end(self, task: Experience) -> None:
        super().end(task)
        self._keep_out()
        self.memory["basis"] = self.subspace.grown(self._basis(), self.learner, task)

    def _basis(self) -> dict[str, Tensor]:
        """[O, D] by projection, orthonormal rows."""
        return self.memory.get("basis", {})

    def _rows(self, name: str) -> Tensor:
        """The newest bank's."""
        return self.learner.layers[name].gating.rows[-1]  # type: ignore[union-attr, index]

    @torch.no_grad()
    def _keep_out(self) -> None:
        for name, basis_OD in self._basis().items():
            row_ED = self._rows(name)
            row_ED.copy_(outside(row_ED, basis_OD))
