"""What routers with a fixed number of experts per token share: scores, groups, and a bias for the selection.

Shapes: T tokens, E experts, K experts kept per token, G groups.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unimoe.errors import UserError

from .base import Router

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits_TE: logits_TE.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": lambda logits_TE: F.softplus(logits_TE).sqrt(),
    "logits": lambda logits_TE: logits_TE,
}
"""Functions from logits to the score of each expert: Switch; DeepSeek-V3 (arXiv 2412.19437, eq. 15);
DeepSeek-V4; SparseUnifiedModel."""

Groups = int | Literal["slices"] | None


def check_score(score: str, renormalize: bool) -> None:
    """Raises a UserError for a score that is not known, or whose values have no sum to be divided by."""
    if score not in SCORES:
        raise UserError(f"moe.router.score is {score!r}, expected one of {', '.join(SCORES)}")
    if score == "logits" and renormalize:
        raise UserError("moe.router.renormalize is true, expected false with score: logits")


def divide_by_sum(scores_TX: Tensor) -> Tensor:
    """Rows that sum to 1: weights, and probabilities as losses read them (DeepSeek-V3, eq. 19)."""
    return scores_TX / (scores_TX.sum(dim=-1, keepdim=True) + 1e-20)


def probabilities(score: str, logits_TE: Tensor, scores_TE: Tensor) -> Tensor:
    """[T, E] the scores as probabilities; logits, which have signs, by a softmax."""
    if score == "softmax":
        return scores_TE
    return logits_TE.softmax(dim=-1) if score == "logits" else divide_by_sum(scores_TE)


def keep_groups(choice_TE: Tensor, groups: int, top_groups: int) -> Tensor:
    """[T, E] the values of each token's ``top_groups`` best groups of neighbouring experts, -inf elsewhere.

    A group is as good as the sum of its two best experts (DeepSeek-V3, node-limited routing).
    """
    choice_TGX = choice_TE.unflatten(1, (groups, -1))
    best_TG = choice_TGX.topk(min(2, choice_TGX.shape[2]), dim=-1).values.sum(dim=-1)
    index_TX = best_TG.topk(top_groups, dim=-1).indices
    kept_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter(1, index_TX, True)
    return choice_TGX.masked_fill(~kept_TG[:, :, None], -torch.inf).flatten(1)


def one_of_each_slice(choice_TE: Tensor, slices: int, k: int) -> Tensor:
    """[T, K] the k / slices best experts at each slice of the FFN, so that a token always has whole FFNs.

    Expert c*slices + s is slice s of copy c (upcycle/slice.py).
    """
    if k % slices:
        raise UserError(f"moe.router.k is {k}, expected a multiple of {slices} (moe.experts.slices)")
    copy_TSX = choice_TE.unflatten(1, (-1, slices)).transpose(1, 2).topk(k // slices, dim=-1).indices
    return (copy_TSX * slices + torch.arange(slices, device=choice_TE.device)[:, None]).flatten(1)


def check_groups(groups: Groups, top_groups: int, num_experts: int, slices: int, null: int, k: int) -> None:
    """Raises a UserError where experts cannot be grouped so."""
    if groups == "slices":
        if null:
            raise UserError(
                "moe.router.null_experts: expected 0 with groups: slices, nulls are slices of no FFN"
            )
        if k % slices:
            raise UserError(f"moe.router.k is {k}, expected a multiple of {slices} (moe.experts.slices)")
        return
    if groups is None:
        return
    if not isinstance(groups, int) or groups < 1 or num_experts % groups:
        raise UserError(
            f"moe.router.groups is {groups!r}, expected slices or a divisor of {num_experts} (the experts)"
        )
    least = -(-k * groups // num_experts)
    if not least <= top_groups <= groups:
        raise UserError(f"moe.router.top_groups is {top_groups}, expected {least}..{groups} for k = {k}")


class BiasedRouter(Router):
    """A router with a bias that is added to the scores for the selection only: it balances the load without a
    gradient (auxiliary-loss-free balancing, arXiv 2408.15664, algorithm 1).

    After each step the bias of an expert above the mean load falls by ``bias_rate``; below it, it rises.
    """

    bias: Tensor | None
    """[E] float32 buffer, or None."""
    bias_rate: float

    def set_bias(self, use: bool, rate: float) -> None:
        """Called by the constructor, once ``num_experts`` is known."""
        self.bias_rate = rate
        self.register_buffer("bias", torch.zeros(self.num_experts) if use else None)

    @property
    def acts_on_load(self) -> bool:
        return self.bias is not None

    @torch.no_grad()
    def after_step(self, load_E: Tensor) -> None:
        if self.bias is not None:
            # float32 even where the model was loaded in half precision, which would swallow the steps
            step_E = self.bias_rate * (load_E.mean() - load_E).sign().to(self.bias)
            missing = len(self.bias) - len(step_E)  # experts that are no candidates yet
            self.bias = self.bias.float() + F.pad(step_E, (0, missing))
