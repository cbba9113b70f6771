"""Prototypes near their tokens and away from those of others.

Shapes: T tokens, D hidden, E experts, R routed ones, L layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unimoe.errors import UserError
from unimoe.moe.parts import LOSSES
from unimoe.moe.records import LayerRecord
from unimoe.moe.routers.prototype import PrototypeRouter

from .auxiliary import Across, alone


@LOSSES.register(
    "routing_contrastive",
    source="ProMoE, arXiv 2510.24711; form: the authors' code",
    axis="router regularisation",
)
def routing_contrastive(
    records: Sequence[LayerRecord],
    layers: Mapping[int, Any],
    across: Across = alone,
    temperature: float = 0.07,
) -> Tensor:
    """Each prototype is to be nearer to the mean of its tokens than to the means of other experts' tokens:
    [L].

    The cross-entropy of cos(prototype e, mean j) / ``temperature`` over j with target e, averaged over the
    experts that have tokens; 0 where fewer than two have. Gradients reach prototypes and tokens. It cannot
    bring an expert without tokens back.

    Args:
        records: of the layers.
        layers: the layers by the index of their records.
        across: mean over processes.
        temperature: temperature of the cosines.

    Raises:
        UserError: a router of another kind than ``prototype``.
    """
    return torch.stack([_contrast(one, layers[one.layer].router, across, temperature) for one in records])


def _contrast(record: LayerRecord, router: Any, across: Across, temperature: float) -> Tensor:
    if not isinstance(router, PrototypeRouter):
        raise UserError(
            f"moe.losses.routing_contrastive: found {type(router).__name__}, expected the router prototype"
        )
    chosen_TR = record.routing.chosen()[:, : len(router.prototypes)]
    if record.real_T is not None:
        chosen_TR = chosen_TR & record.real_T[:, None]
    token_TD = record.routing.extra["token_TD"]
    member_TR = chosen_TR.to(token_TD.dtype)
    sums_RD1 = torch.cat([member_TR.T @ token_TD, member_TR.sum(dim=0)[:, None]], dim=1)
    means = across(sums_RD1)  # of sums over processes, whose quotient is the mean of the global batch
    count_R1 = means[:, -1:]
    alive_R = count_R1[:, 0] > 0
    mean_RD = means[:, :-1] / torch.where(count_R1 > 0, count_R1, 1)
    prototypes_RD = F.normalize(router.prototypes.to(mean_RD.dtype), dim=-1)
    cosine_RR = prototypes_RD @ F.normalize(mean_RD, dim=-1).T / temperature
    if int(alive_R.sum()) < 2:
        return 0 * cosine_RR.sum()
    return F.cross_entropy(
        cosine_RR[alive_R][:, alive_R], torch.arange(int(alive_R.sum()), device=alive_R.device)
    )
