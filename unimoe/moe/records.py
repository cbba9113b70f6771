"""What a forward pass knew and chose, collected without touching the host model.

``with routing_context(Context(...)):`` is opened by the model around its decoder, ``with record() as
records:`` by whoever wants the routing of each MoE layer: the training step for its losses, plots, analyses.
Both are context variables, so threads do not mix.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

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


def current_context() -> Context:
    """The innermost ``routing_context``, or one that knows nothing."""
    return _context.get()


def append(layer: int, routing: Routing) -> None:
    """Adds to the active ``record()``, if there is one."""
    records = _records.get()
    if records is not None:
        records.append(LayerRecord(layer, routing, _context.get()))
