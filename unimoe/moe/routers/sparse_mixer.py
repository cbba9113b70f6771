"""SparseMixer, the gradient estimator of Uni-MoE's successors: sampled experts with a useful gradient.

Shapes: T tokens, E experts.
"""

import torch
from torch import Tensor

GRADIENT_ESTIMATORS = {"paper": (5 / 8, 2.0), "code": (1 / 4, 1.0)}
"""Probability that a sampled expert other than the best keeps its full weight, and the factor of the weight's
gradient: as in the paper of Uni-MoE-2.0-Omni (2511.12609), and as in UniMoE-Audio's code."""


def sparse_mixer(logits_TE: Tensor, k_T: Tensor, jitter: float, whole: float, slope: float) -> Tensor:
    """[T, E] random weights of the ``k_T`` experts that each token samples, 0 elsewhere (SparseMixer,
    2310.00811; GRIN, 2409.12136).

    Slot by slot:

    1. of the experts not sampled yet, those whose logit is below the best one by more than 2 ``jitter``
       (relative) are masked; o is the softmax over the rest
    2. one expert is sampled from o (Gumbel noise)
    3. its weight is o, or o / 3 if it is not the best expert and a draw of probability ``whole`` fails
    4. the gradient is that of ``slope`` * o, whatever the weight

    This is the midpoint rule between 0 and o: the router also learns from experts that it ranked lower.
    """
    weight_TE = torch.zeros_like(logits_TE)
    left_TE = logits_TE
    for slot in range(int(k_T.max()) if len(k_T) else 0):
        best_T1 = left_TE.max(dim=-1, keepdim=True).values
        size_TE = torch.maximum(logits_TE.abs(), best_T1.abs()).detach()
        near_TE = (best_T1 - left_TE).detach() <= 2 * jitter * size_TE
        gates_TE = left_TE.masked_fill(~near_TE, -torch.inf).softmax(dim=-1)
        noise_TE = -torch.empty_like(gates_TE).exponential_().log()
        pick_T1 = (left_TE.masked_fill(~near_TE, -torch.inf) + noise_TE).argmax(dim=-1, keepdim=True).detach()
        o_T1 = gates_TE.gather(1, pick_T1)
        is_best_T1 = o_T1 == gates_TE.max(dim=-1, keepdim=True).values
        keeps_T1 = is_best_T1 | (torch.rand_like(o_T1) < whole)
        value_T1 = o_T1.detach() * torch.where(keeps_T1, 1.0, 1 / 3)
        o_T1 = value_T1 + slope * (o_T1 - o_T1.detach())
        used_T1 = slot < k_T[:, None]
        weight_TE = weight_TE.scatter_add(1, pick_T1, o_T1 * used_T1)
        left_TE = left_TE.scatter(1, pick_T1, -torch.inf)
    return weight_TE
