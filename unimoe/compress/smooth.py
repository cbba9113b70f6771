"""Preparing a mixture for few bits (EAQuant, arXiv 2506.13329): scales of channels moved into the norm before
it, and a router clipped so that it keeps its choices.

Shapes: T tokens, D hidden, E experts, M consumers of a norm's output, O outputs of one of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def channel_scales(
    absmax_MD: Tensor, weights: Sequence[Tensor], alpha: float = 0.6, least: float = 1e-5
) -> Tensor:
    """[D] what each channel of a norm's output is divided by, and each consumer's input multiplied with (eq.
    5).

    Of every consumer, max|x|^alpha / max|W|^(1 - alpha); of a channel the greatest of all consumers.
    Consumers are the experts, each with the tokens that it gets, the router, and shared experts.

    Args:
        absmax_MD: largest absolute value of each channel over a consumer's tokens; 0 where it had none.
        weights: of each consumer [O, D], the gate's rows and the up projection's together.
        alpha: 1 moves the whole range of the activations into the weights. The released runs have 0.6.
    """
    largest_MD = torch.stack([w.detach().float().abs().amax(0) for w in weights]).clamp_min_(least)
    scale_D = (absmax_MD.float() ** alpha / largest_MD ** (1 - alpha)).amax(0)
    return torch.where(scale_D > 0, scale_D.clamp_min(least), 1.0)


def clipped(w_ED: Tensor, bits: int, ratio: float) -> Tensor:
    """Rows rounded to ``bits`` with a scale that spans ``ratio`` of their largest weight."""
    most = (1 << (bits - 1)) - 1
    scale = (w_ED.abs().amax(-1, keepdim=True) * ratio / most).clamp_min(1e-12)
    return (w_ED / scale).round().clamp(-most - 1, most) * scale


def router_clip(
    router_ED: Tensor, x_TD: Tensor, bits: int, top_k: int, beyond: float = 0.0, steps: int = 101
) -> float:
    """The clipping of a router's rows that changes its probabilities least (section 4.2).

    Compared are the probabilities over all experts, gathered at the ``top_k + beyond * (E - top_k)`` experts
    with the greatest logits of the unrounded router; ratios from 0.35 to 1 are tried, and the one with the
    least KL is returned. ``beyond`` is 0 in the released runs (``per_channel_kl_top0``).
    """
    w_ED, x_TD = router_ED.detach().float(), x_TD.float()
    logits_TE = x_TD @ w_ED.t()
    kept = top_k + int(beyond * (len(w_ED) - top_k))
    index_TM = logits_TE.topk(kept).indices
    wanted_TM = logits_TE.log_softmax(-1).gather(1, index_TM)

    def divergence(ratio: float) -> float:
        found_TE = (x_TD @ clipped(w_ED, bits, ratio).t()).log_softmax(-1)
        kl = F.kl_div(found_TE.gather(1, index_TM), wanted_TM, log_target=True, reduction="batchmean")
        return kl.item()

    return min(torch.linspace(0.35, 1, steps).tolist(), key=divergence)
