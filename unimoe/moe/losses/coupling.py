"""Coupling of experts and their rows of the router.

Shapes: E experts, D hidden, I intermediate, L layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from unimoe.errors import UserError
from unimoe.moe.experts.ffn import FFNExperts
from unimoe.moe.experts.swiglu import SwiGLUExperts
from unimoe.moe.parts import LOSSES
from unimoe.moe.records import LayerRecord

from .auxiliary import Across, alone


@LOSSES.register(
    "coupling",
    source="ERC, arXiv 2512.23447, section 3",
    axis="router regularisation",
    indivisible="reads whole weights; train without sharding and expert_parallel",
)
def coupling(
    records: Sequence[LayerRecord], layers: Mapping[int, Any], across: Across = alone, alpha: float = 1.0
) -> Tensor:
    """Expert-router coupling: each expert answers its own row of the router most, and each row is answered
    most by its own expert: [L].

    M_ij = norm of expert j's first product with row i; the loss is the mean over i, j of how far M_ij and
    M_ji exceed ``alpha`` M_ii. In training, the rows have multiplicative noise that keeps each nearer to
    itself than to any other. It depends on weights alone, so its cost does not grow with the batch.

    Args:
        records: of the layers.
        layers: the layers by the index of their records.
        across: mean over processes.
        alpha: at most 1; smaller makes experts more specialised.

    Raises:
        UserError: a router without a row for each expert, experts of another kind than FFNs, or weights that
            are divided among processes.
    """
    return across(torch.stack([_coupling(layers[one.layer], alpha) for one in records]))


def _coupling(layer: Any, alpha: float) -> Tensor:
    rows_ED, first_EID = getattr(layer.router, "weight", None), _first(layer.experts)
    if rows_ED is None or first_EID is None:
        kinds = f"{type(layer.router).__name__} and {type(layer.experts).__name__}"
        raise UserError(f"moe.losses.coupling: found {kinds}, expected a linear router and FFN experts")
    if isinstance(rows_ED, DTensor) or isinstance(first_EID, DTensor):
        raise UserError(f"moe.losses.coupling {LOSSES['coupling'].indivisible}")
    rows_ED = rows_ED[: len(first_EID)].float()  # null experts have rows behind these
    if layer.training:
        rows_ED = rows_ED * _noise(rows_ED.detach())
    M_EE = torch.einsum("id,jfd->ijf", rows_ED, first_EID.float()).norm(dim=-1)
    own_E1 = alpha * M_EE.diagonal()[:, None]
    excess_EE = (M_EE - own_E1).relu() + (M_EE.T - own_E1).relu()
    other_EE = ~torch.eye(len(M_EE), dtype=torch.bool, device=M_EE.device)
    return (excess_EE * other_EE).mean()


def _first(experts: Any) -> Tensor | None:
    """[E, I, D] of the experts' first layer: the gate of a SwiGLU."""
    if isinstance(experts, SwiGLUExperts):
        return experts.gate_up_proj[:, : experts.intermediate_size]
    return experts.up_proj if isinstance(experts, FFNExperts) else None


def _noise(rows_ED: Tensor) -> Tensor:
    """[E, D] factors in 1 +- half the distance to the nearest other row, over the row's norm."""
    apart_EE = torch.cdist(rows_ED, rows_ED).fill_diagonal_(torch.inf)
    width_E1 = apart_EE.amin(dim=1, keepdim=True) / (2 * rows_ED.norm(dim=1, keepdim=True).clamp(min=1e-9))
    width_E1 = torch.where(width_E1.isfinite(), width_E1, 0)  # one expert alone
    return 1 + width_E1 * (2 * torch.rand_like(rows_ED) - 1)
