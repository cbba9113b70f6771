"""Adaptation of a trained dense model to sparse drawing FFNs (SparseUnifiedModel, arXiv 2512.02351).

Shapes: I inner width of an FFN.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from unimoe.moe import MoELayer, measure_importance

from .network import SwiGLU, UnifiedNet, sparse_ffn


def adapt(dense: UnifiedNet, model: UnifiedNet, draw: Callable[[], Any]) -> None:
    """Give ``model``, of another design, the weights of ``dense``.

    1. the importance of each unit is measured: its mean absolute activation while ``draw`` runs
    2. its FFNs are made of those of ``dense``: experts of equal importance, or the units that are left
    3. all other weights are copied
    """
    config = model.config
    ffns = {index: cast(SwiGLU, _drawing_ffn(dense, index)) for index in config.adapted}
    # (1)
    measure_importance(list(ffns.values()), draw)
    # (2)
    for index, ffn in ffns.items():
        own = _drawing_ffn(model, index)
        if isinstance(own, MoELayer):
            own.experts.load_state_dict(sparse_ffn(ffn, config, index).experts.state_dict())
        elif config.design == "pruned":
            units_I = important_units(ffn, config.kept)
            own.gate_proj.weight.data.copy_(ffn.gate_proj.weight.data[units_I])
            own.up_proj.weight.data.copy_(ffn.up_proj.weight.data[units_I])
            own.down_proj.weight.data.copy_(ffn.down_proj.weight.data[:, units_I])
        else:
            own.load_state_dict(ffn.state_dict())
    # (3)
    changed = tuple(f"blocks.{index}.draw.ffn." for index in ffns)
    others = {name: value for name, value in dense.state_dict().items() if not name.startswith(changed)}
    missing, unexpected = model.load_state_dict(others, strict=False)
    assert not unexpected and all(name.startswith(changed) for name in missing)


def important_units(ffn: SwiGLU, count: int) -> Tensor:
    """[count] units of the largest product of mean activation and norm of their output weights, in order."""
    activation_I = cast(Tensor, ffn.unit_importance)
    score_I = activation_I * ffn.down_proj.weight.detach().norm(dim=0).to(activation_I)
    return torch.argsort(score_I, descending=True, stable=True)[:count].sort().values


def _drawing_ffn(model: UnifiedNet, index: int) -> Any:
    return cast(Any, model.blocks[index]).draw.ffn
