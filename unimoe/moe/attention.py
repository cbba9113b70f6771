"""Attention as experts: the query heads of several models in one attention layer of transformers, with a gate
for each model in front of the output projection (BAM, arXiv 2408.08274, section 3).

Shapes: B batch, S sequence, D hidden, E attention experts, H query and K key-value heads of each, X width of
what a gate multiplies, G = K with shared keys and values, else 1.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimoe.errors import UserError

KV = Literal["shared", "experts"]


class AttentionExperts(nn.Module):
    """y = sum over E experts of g_e(z) MHA_e(z), g = softmax(z W^T): soft routing, as in BAM's main model.

    ``attention`` is the stock layer with the query heads of all experts, so that masks, positions, caches and
    attention kernels are those of transformers; its output projection is the identity. With shared keys and
    values the cache is that of one expert.
    """

    def __init__(
        self, attention: nn.Module, o_proj: nn.Linear, num_experts: int, groups: int, init_std: float = 0.02
    ):
        super().__init__()
        self.attention, self.o_proj, self.groups, self.init_std = attention, o_proj, groups, init_std
        self.gate = nn.Parameter(o_proj.weight.new_empty(num_experts, o_proj.out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.gate, std=self.init_std)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        y_BSX, *rest = self.attention(hidden_states, *args, **kwargs)
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        gate_BSE = F.linear(hidden_states.to(dtype), self.gate.to(dtype)).softmax(dim=-1).to(y_BSX.dtype)
        heads_BSGEX = y_BSX.unflatten(-1, (self.groups, len(self.gate), -1)) * gate_BSE[:, :, None, :, None]
        return self.o_proj(heads_BSGEX.flatten(2)), *rest

    def extra_repr(self) -> str:
        return f"experts={len(self.gate)}"


@torch.no_grad()
def attention_experts(attention: nn.Module, sources: Sequence[nn.Module], kv: KV) -> AttentionExperts:
    """The attention layers of several models as experts of one; they are not changed.

    Args:
        attention: of the model that the result goes into. With ``kv="shared"`` its keys and values are those
            of all experts.
        sources: one attention layer for each expert.
        kv: ``shared`` keys and values, or those of each of the ``experts``, whose cache is E times as large.

    Raises:
        UserError: an attention layer without plain query, key, value and output projections, or of another
            shape.
    """
    heads = [_heads(one) for one in (attention, *sources)]
    if len(set(heads)) > 1:
        raise UserError(f"moe.attention: the experts' heads are {heads[1:]}, expected {heads[0]} of each")
    groups = heads[0][1] if kv == "shared" else 1
    mixed: Any = _shallow_copy(attention)
    joined = {name: _join(sources, name, groups) for name in ("q_proj", "o_proj")}
    if kv == "experts":
        joined |= {name: _join(sources, name, 1) for name in ("k_proj", "v_proj")}
    else:
        mixed.num_key_value_groups = len(sources) * mixed.num_key_value_groups
    for name, linear in joined.items():
        setattr(mixed, name, linear)
    o_proj, mixed.o_proj = mixed.o_proj, nn.Identity()
    return AttentionExperts(mixed, o_proj, len(sources), groups)


def _join(sources: Sequence[nn.Module], name: str, groups: int) -> nn.Linear:
    """One projection of all sources, in the order [group, expert, the group's heads]."""
    linears: list[Any] = [getattr(one, name) for one in sources]
    dim = 1 if name == "o_proj" else 0
    parts = [linear.weight.unflatten(dim, (groups, -1)) for linear in linears]
    weight = torch.stack(parts, dim=dim + 1).flatten(dim, dim + 2)
    with torch.device("meta"):
        joined = nn.Linear(weight.shape[1], weight.shape[0], bias=linears[0].bias is not None)
    joined.weight = nn.Parameter(weight)
    if joined.bias is not None:
        biases = [linear.bias.unflatten(0, (groups, -1)) for linear in linears]
        joined.bias = nn.Parameter(torch.stack(biases, dim=1).flatten())
    return joined


def _heads(attention: Any) -> tuple[int, int]:
    """(H, K) of an attention layer. Raises UserError where its projections are not as LLaMA's."""
    name, projections = type(attention).__name__, ("q_proj", "k_proj", "v_proj", "o_proj")
    linears: list[Any] = [getattr(attention, one, None) for one in projections]
    plain = all(isinstance(one, nn.Linear) for one in linears) and hasattr(attention, "num_key_value_groups")
    if not plain or linears[3].bias is not None:
        raise UserError(f"moe.attention: {name} has not the projections {', '.join(projections)} as LLaMA's")
    H, K = (linears[one].out_features // attention.head_dim for one in (0, 1))
    if K * attention.num_key_value_groups != H or linears[3].in_features != H * attention.head_dim:
        raise UserError(f"moe.attention: {name}: {H} query heads and {K} key-value heads, expected LLaMA's")
    return H, K


def _shallow_copy(attention: nn.Module) -> nn.Module:
    """The same layer with a table of its own of what it consists of, so that projections can be replaced."""
    copied = object.__new__(type(attention))
    copied.__dict__ = {**attention.__dict__, "_modules": dict(attention._modules)}
    return copied
