"""What a forward pass knew and chose, collected without touching the host model.

``with routing_context(Context(...)):`` is opened by the model around its decoder, ``with record() as
records:`` by whoever wants the routing of each MoE layer: the training step for its losses, plots, analyses.
Both are context variables, so threads do not mix.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .routing import Routing


@dataclass(frozen=True)
class Context:
    """What is known about the T tokens of a forward pass, flattened in the order of the hidden states ([B, S]
    -> T)."""

    pad_T: Tensor | None = None
    """[T] bool, True where the token is padding; None when nothing is padded."""
    modality_T: Tensor | None = None
    """[T] int64 modality id of each token (text 0, image 1, video 2, speech 3, audio 4)."""
    sample_T: Tensor | None = None
    """[T] int64 index of the sample each token belongs to."""


@dataclass(frozen=True)
class LayerRecord:
    """One MoE layer's routing in one forward pass; its tensors are part of the autograd graph."""

    layer: int
    """Index of the decoder layer, -1 where nobody set it."""
    routing: Routing
    ctx: Context
    """As it was during the forward pass."""


_NOTHING_KNOWN = Context()
_context: ContextVar[Context] = ContextVar("unimoe_routing_context", default=_NOTHING_KNOWN)
_records: ContextVar[list[LayerRecord] | None] = ContextVar("unimoe_routing_records", default=None)


@contextmanager
def routing_context(ctx: Context) -> Iterator[Context]:
    """Tells the MoE layers inside about the tokens they see."""
    token = _context.set(ctx)
    try:
        yield ctx
    finally:
        _context.reset(token)


@contextmanager
def record() -> Iterator[list[LayerRecord]]:
    """Collects a LayerRecord of each MoE layer's forward inside, in order; nested ones all collect."""
    records: list[LayerRecord] = []
    outer = _records.get()
    token = _records.set(records)
    try:
        yield records
    finally:
        _records.reset(token)
        if outer is not None:
            outer.extend(records)


def join(records: list[LayerRecord]) -> list[LayerRecord]:
    """One record a layer out of several forward passes' records, as if all tokens had come in one pass."""
    layers: dict[int, list[LayerRecord]] = {}
    for entry in records:
        layers.setdefault(entry.layer, []).append(entry)
    return [_join(entries) if len(entries) > 1 else entries[0] for entries in layers.values()]


def _join(entries: list[LayerRecord]) -> LayerRecord:
    routings = [entry.routing for entry in entries]
    starts = accumulate((routing.num_tokens for routing in routings), initial=0)
    expert_N, order_N = torch.sort(torch.cat([routing.expert_N for routing in routings]), stable=True)
    routing = Routing(
        torch.cat([routing.token_N + start for routing, start in zip(routings, starts, strict=False)])[
            order_N
        ],
        expert_N,
        torch.cat([routing.weight_N for routing in routings])[order_N],
        torch.stack([routing.offsets_E1 for routing in routings]).sum(0),
        torch.cat([routing.logits_TE for routing in routings]),
        torch.cat([routing.probs_TE for routing in routings]),
    )
    known = {}
    for name in ("pad_T", "modality_T", "sample_T"):
        parts = [getattr(entry.ctx, name) for entry in entries]
        known[name] = torch.cat(parts) if all(part is not None for part in parts) else None
    return LayerRecord(entries[0].layer, routing, Context(**known))


def current_context() -> Context:
    """The innermost ``routing_context``, or one that knows nothing."""
    return _context.get()


def append(layer: int, routing: Routing) -> None:
    """Adds to the active ``record()``, if there is one."""
    records = _records.get()
    if records is not None:
        records.append(LayerRecord(layer, routing, _context.get()))
