"""One record per MoE layer from the records of several forward passes.

Shapes: T tokens, E experts, N (token, expert) pairs sorted by expert, B samples, C size of a condition.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from .records import Context, LayerRecord
from .routing import Pairs, Routing


def join(records: list[LayerRecord]) -> list[LayerRecord]:
    """One record per layer from the records of several forward passes, as if all tokens were one batch.

    Raises:
        ValueError: ``Routing.extra`` has a tensor that cannot be joined.
    """
    layers: dict[tuple[int, str], list[LayerRecord]] = {}
    for entry in records:
        layers.setdefault((entry.layer, entry.projection), []).append(entry)
    return [_join(entries) if len(entries) > 1 else entries[0] for entries in layers.values()]


def _join(entries: list[LayerRecord]) -> LayerRecord:
    routings = [entry.routing for entry in entries]
    starts = accumulate((routing.num_tokens for routing in routings), initial=0)
    tokens = [routing.token_N + start for routing, start in zip(routings, starts, strict=False)]
    expert_N, order_N = torch.sort(torch.cat([routing.expert_N for routing in routings]), stable=True)
    pairs = Pairs(
        torch.cat(tokens)[order_N],
        expert_N,
        torch.cat([routing.weight_N for routing in routings])[order_N],
        torch.stack([routing.offsets_E1 for routing in routings]).sum(0),
    )
    routing = Routing.from_pairs(
        pairs,
        torch.cat([routing.logits_TE for routing in routings]),
        torch.cat([routing.probs_TE for routing in routings]),
        _join_extra([routing.extra for routing in routings], order_N),
    )
    known = {}
    for name in ("pad_T", "modality_T", "token_T"):
        parts = [getattr(entry.ctx, name) for entry in entries]
        known[name] = torch.cat(parts) if all(part is not None for part in parts) else None
    known |= _join_samples([entry.ctx for entry in entries])
    return LayerRecord(entries[0].layer, routing, Context(**known), entries[0].projection)


def _join_samples(contexts: Sequence[Context]) -> dict[str, Tensor]:
    """``sample_T``, ``cond_BC``, ``label_B`` and ``time_B``, where every forward pass has them, the samples
    numbered through."""
    known: dict[str, Tensor] = {}
    for name in ("cond_BC", "label_B", "time_B"):
        parts = [getattr(ctx, name) for ctx in contexts]
        if all(part is not None for part in parts):
            known[name] = torch.cat(parts)
    samples = [ctx.sample_T for ctx in contexts if ctx.sample_T is not None]
    if len(samples) == len(contexts):
        # without a lookup numbers only have to differ; counting samples would wait for a GPU
        rows = [getattr(ctx, next(iter(known))) for ctx in contexts] if known else samples
        starts = accumulate((len(row) for row in rows if row is not None), initial=0)
        known["sample_T"] = torch.cat([own + start for own, start in zip(samples, starts, strict=False)])
    return known


def _join_extra(extras: Sequence[dict[str, Tensor]], order_N: Tensor) -> dict[str, Tensor]:
    """Joined by the shape letters at the end of each name: T* are concatenated, N* concatenated and sorted
    like the pairs; all others belong to the layer and must be the same tensor in each pass."""
    joined: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for extra in extras for name in extra):
        parts = [extra.get(name) for extra in extras]
        present = [part for part in parts if part is not None]
        letters = name.rpartition("_")[2]
        if not letters[:1].isupper():
            raise ValueError(
                f"Routing.extra has {name!r}, expected a name that ends in shape letters: bias_E"
            )
        if len(present) < len(parts):
            raise ValueError(f"Routing.extra has {name!r} in {len(present)} of {len(parts)} forward passes")
        if letters[0] == "T":
            joined[name] = torch.cat(present)
        elif letters[0] == "N":
            joined[name] = torch.cat(present)[order_N]
        elif all(part is present[0] for part in present):
            joined[name] = present[0]
        else:
            raise ValueError(
                f"Routing.extra has another {name!r} in each forward pass, expected one tensor of the layer, "
                "or a name whose shape letters begin with T (tokens) or N (pairs)"
            )
    return joined
