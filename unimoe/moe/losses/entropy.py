"""The entropy of routing.

Shapes: T tokens, L layers. Padding tokens count nowhere.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unimoe.moe.parts import LOSSES
from unimoe.moe.records import LayerRecord

from .auxiliary import Across, alone


@LOSSES.register(
    "entropy", source="Huang et al., arXiv 2403.07652, section 3.3", axis="router regularisation"
)
def entropy(
    records: Sequence[LayerRecord], layers: Mapping[int, Any] | None = None, across: Across = alone
) -> Tensor:
    """Mean entropy of a token's probabilities, in nats: [L].

    0 where one expert has all, log E where all are alike. As a loss it makes top-p choose fewer experts.
    """
    tiny = torch.finfo(torch.float32).tiny  # a probability of 0 has entropy and gradient 0, not NaN
    probs = [one.routing.probs_TE for one in records]
    terms = [-(p_TE * p_TE.clamp(min=tiny).log()).sum(dim=1, keepdim=True) for p_TE in probs]
    totals_L = torch.cat([one.total(term_T1) for one, term_T1 in zip(records, terms, strict=True)])
    tokens_L = torch.stack([one.tokens for one in records])
    return across(totals_L) / across(tokens_L).clamp(min=1)
