"""Principal directions of earlier tasks' tokens, at every adapted projection.

Shapes: T tokens, D inputs of a projection, O directions of earlier tasks, P new ones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unimoe.errors import UserError
from unimoe.model.host_loss import last_hidden

from .learner import Learner
from .stream import Experience


@dataclass
class Subspace:
    """How the directions of a task are computed."""

    energy: float = 0.9
    """Fraction of the squared length of a task's tokens that its directions and earlier ones cover."""
    samples: int = 32
    """Number of samples of each task whose tokens are used."""

    def __post_init__(self) -> None:
        if not 0 < self.energy < 1 or self.samples < 1:
            raise UserError(
                f"energy must lie between 0 and 1 and samples be above 0, found {self.energy}, {self.samples}"
            )

    @torch.no_grad()
    def tokens(self, learner: Learner, task: Experience, each: int = 64) -> dict[str, Tensor]:
        """Normalised inputs of every projection in the model's current state.

        Before a task, guidance is that of its first step.

        Returns:
            [T, D] by projection, at most ``each`` tokens of a sample.
        """
        tokens: dict[str, list[Tensor]] = {name: [] for name in learner.layers}
        chance = torch.Generator().manual_seed(task.index)
        chosen_T = torch.empty(0)

        def note(name: str):
            def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                x_TD = inputs[0].flatten(0, -2)[chosen_T.to(inputs[0].device)]
                tokens[name].append(nn.functional.normalize(x_TD.float(), dim=-1))

            return hook

        handles = [layer.register_forward_pre_hook(note(name)) for name, layer in learner.layers.items()]
        for sample in task.samples[: self.samples]:
            for part in learner.collate([sample]):
                chosen_T = torch.randperm(part["input_ids"].numel(), generator=chance)[:each]
                last_hidden(learner.model, part)
        for handle in handles:
            handle.remove()
        return {name: torch.cat(parts) for name, parts in tokens.items()}

    def grown(self, basis: dict[str, Tensor], learner: Learner, task: Experience) -> dict[str, Tensor]:
        """``basis`` ([O, D] by projection, orthonormal rows; empty at first) extended by the principal
        directions of a task's tokens."""
        found = {}
        for name, tokens_TD in self.tokens(learner, task).items():
            seen_OD = basis.get(name, tokens_TD[:0])
            found[name] = torch.cat([seen_OD, principal(tokens_TD, seen_OD, self.energy)])
        return found


def principal(tokens_TD: Tensor, seen_OD: Tensor, energy: float) -> Tensor:
    """[P, D] the fewest directions that, with those of earlier tasks, cover ``energy`` of the tokens."""
    outside_TD = outside(tokens_TD, seen_OD)
    squared_D, direction_DD = torch.linalg.eigh(outside_TD.T @ outside_TD)  # ascending; a column each
    missing_D = squared_D.cumsum(0)  # of the tokens, before each direction joins
    return direction_DD.T[missing_D > (1 - energy) * tokens_TD.square().sum()].flip(0)


def outside(x_D: Tensor, basis_OD: Tensor) -> Tensor:
    """The component of x [..., D] orthogonal to the basis."""
    return x_D - x_D @ basis_OD.T @ basis_OD
