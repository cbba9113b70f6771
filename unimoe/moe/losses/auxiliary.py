"""The auxiliary losses that a configuration asks for, as one number.

Shapes: L layers.
"""

from collections.abc import Sequence

from torch import Tensor

from unimoe.moe.config import MoEConfig
from unimoe.moe.load_counts import ExpertLoad
from unimoe.moe.records import LayerRecord

from .balance import load_balance
from .z import z_loss


def auxiliary_loss(
    moe: MoEConfig,
    records: Sequence[LayerRecord],
    load: ExpertLoad | None = None,
) -> Tensor:
    """The configured auxiliary losses, weighted and summed over the recorded layers (at least one): 0-d.

    ``load`` as of :func:`load_balance`.
    """
    total = records[0].routing.logits_TE.new_zeros(())
    if moe.balance_coef:
        total = total + moe.balance_coef * load_balance(records, load).sum()
    if moe.z_coef:
        total = total + moe.z_coef * z_loss(records, None if load is None else load.tokens).sum()
    return total
