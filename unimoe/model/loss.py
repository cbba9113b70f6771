"""The supervised loss: next-token cross-entropy over the tokens with a label.

Shapes: B rows, T tokens of a row, X hidden size or vocabulary, S supervised tokens of a batch, V vocabulary.
"""

from torch import Tensor
from torch.nn import functional as nnf

from .configuration import IGNORED


def supervised(states_BTX: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The states that predict a supervised token, and that token.

    Returns:
        states [S, X], of the position before each token with a label, and the labels [S].
    """
    labels_BT = labels_BT[:, 1:]
    keep_BT = labels_BT != IGNORED
    return states_BTX[:, :-1][keep_BT], labels_BT[keep_BT]


def cross_entropy_sum(logits_SV: Tensor, labels_S: Tensor) -> Tensor:
    """Sum over the supervised tokens (0-d), computed in float32."""
    return nnf.cross_entropy(logits_SV.float(), labels_S, reduction="sum")
