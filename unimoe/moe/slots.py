"""A routing as slots of each token, and back.

Shapes: T tokens, E experts, K slots of a token, N (token, expert) pairs.
"""

import torch
from torch import Tensor

from .routing import Pairs, Routing, sort_by_expert


def slots(routing: Routing) -> tuple[Tensor, Tensor]:
    """[T, K] experts and weights; a token with fewer experts than another has ids ``num_experts``."""
    index_TK, weight_TK = getattr(routing, "index_TK", None), getattr(routing, "weight_TK", None)
    if index_TK is not None and weight_TK is not None:
        return index_TK, weight_TK
    order_N = torch.sort(routing.token_N, stable=True).indices
    token_N = routing.token_N[order_N]
    first_T = torch.searchsorted(token_N, torch.arange(routing.num_tokens, device=token_N.device))
    slot_N = torch.arange(len(token_N), device=token_N.device) - first_T[token_N]
    shape = (routing.num_tokens, int(slot_N.max()) + 1 if len(slot_N) else 1)
    index_TK = token_N.new_full(shape, routing.num_experts)
    index_TK[token_N, slot_N] = routing.expert_N[order_N]
    weight_TK = routing.weight_N.new_zeros(shape).index_put((token_N, slot_N), routing.weight_N[order_N])
    return index_TK, weight_TK


def of_slots(routing: Routing, index_TK: Tensor, weight_TK: Tensor) -> Routing:
    """A routing like another, with these slots."""
    slot_N, token_N, expert_N, offsets_E1 = sort_by_expert(index_TK, routing.num_experts)
    end = int(offsets_E1[-1])
    weight_N = weight_TK.reshape(-1).index_select(0, slot_N[:end])
    extra = {name: one for name, one in routing.extra.items() if not name.rpartition("_")[2].startswith("N")}
    pairs = Pairs(token_N[:end], expert_N[:end], weight_N, offsets_E1)
    return Routing.from_pairs(pairs, routing.logits_TE, routing.probs, extra)
