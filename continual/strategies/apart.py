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
from unimoe.errors import UserError
from unimoe.training.loss import last_hidden

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
        if not 0 < energy < 1 or samples < 1:
            raise UserError(
                f"dymoe_apart needs energy between 0 and 1 and samples above 0, found {energy} and {samples}"
            )
        self.energy, self.samples = energy, samples

    @torch.no_grad()
    def begin(self, task: Experience) -> None:
        super().begin(task)
        if self._basis():
            for name, tokens_TD in self._tokens(task).items():
                basis_OD, row_ED = self._basis()[name], self._rows(name)
                own_D = nn.functional.normalize(_outside(tokens_TD.mean(0), basis_OD), dim=0)
                row_ED.copy_(own_D + nn.functional.normalize(_outside(row_ED, basis_OD), dim=-1))

    def loss(self, batch: list[dict[str, Any]], step: int, steps: int) -> Tensor:
        self._keep_out()
        return super().loss(batch, step, steps)

    @torch.no_grad()
    def end(self, task: Experience) -> None:
        super().end(task)
        self._keep_out()
        basis = self._basis()
        for name, tokens_TD in self._tokens(task).items():
            seen_OD = basis.get(name, tokens_TD[:0])
            basis[name] = torch.cat([seen_OD, _principal(tokens_TD, seen_OD, self.energy)])
        self.memory["basis"] = basis

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
            row_ED.copy_(_outside(row_ED, basis_OD))

    def _tokens(self, task: Experience, each: int = 64) -> dict[str, Tensor]:
        """[T, D] by projection: normalised tokens, at most ``each`` of a sample, as the model is now.

        Before a task that is with the guidance of its first step.
        """
        tokens: dict[str, list[Tensor]] = {name: [] for name in self.learner.layers}
        chance = torch.Generator().manual_seed(task.index)
        chosen_T = torch.empty(0)

        def note(name: str):
            def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                x_TD = inputs[0].flatten(0, -2)[chosen_T.to(inputs[0].device)]
                tokens[name].append(nn.functional.normalize(x_TD.float(), dim=-1))

            return hook

        handles = [layer.register_forward_pre_hook(note(name)) for name, layer in self.learner.layers.items()]
        for sample in task.samples[: self.samples]:
            for part in self.learner.collate([sample]):
                chosen_T = torch.randperm(part["input_ids"].numel(), generator=chance)[:each]
                last_hidden(self.learner.model, part)
        for handle in handles:
            handle.remove()
        return {name: torch.cat(parts) for name, parts in tokens.items()}


def _principal(tokens_TD: Tensor, seen_OD: Tensor, energy: float) -> Tensor:
    """[P, D] the fewest directions that, with those seen before, cover ``energy`` of the tokens."""
    outside_TD = _outside(tokens_TD, seen_OD)
    squared_D, direction_DD = torch.linalg.eigh(outside_TD.T @ outside_TD)  # ascending; a column each
    missing_D = squared_D.cumsum(0)  # of the tokens, before each direction joins
    return direction_DD.T[missing_D > (1 - energy) * tokens_TD.square().sum()].flip(0)


def _outside(x_D: Tensor, basis_OD: Tensor) -> Tensor:
    """What of x [..., D] is orthogonal to the basis."""
    return x_D - x_D @ basis_OD.T @ basis_OD
