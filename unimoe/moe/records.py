"""What a forward pass knows about its tokens, and what its routers decided.

The model opens ``with routing_context(Context(...)):`` around its decoder. Whoever needs the routing of each
MoE layer (losses, plots, analyses) opens ``with record() as records:``. Both are context variables, so
threads do not interfere. Gradient checkpointing runs layers a second time in the backward pass, after both
have closed: :func:`remember_context` gives that run the context of the first.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .routing import Routing


@dataclass(frozen=True)
class Context:
    """What is known about the T tokens of a forward pass, flattened like the hidden states ([B, S] -> T)."""

    pad_T: Tensor | None = None
    """[T] bool, True where the token is padding; None when nothing is padded."""
    modality_T: Tensor | None = None
    """[T] int64 modality id of each token (text 0, image 1, video 2, speech 3, audio 4)."""
    sample_T: Tensor | None = None
    """[T] int64 number of the sample of each token: its row in ``cond_BC`` and ``label_B``, if given."""
    token_T: Tensor | None = None
    """[T] int64 id of each token in the vocabulary."""
    cond_BC: Tensor | None = None
    """[B, C] float embedding of each sample, such as that of a timestep."""
    label_B: Tensor | None = None
    """[B] int64 label of each sample, such as a class or a task."""
    time_B: Tensor | None = None
    """[B] float in 0..1, time of each sample in a diffusion process."""
    carry: dict[str, Tensor] | None = None
    """What routers of earlier layers leave to those of later ones in the same forward pass, by name;
    ``routing_context`` opens it. None outside of one, so that nothing passes between forward passes."""


@dataclass(frozen=True)
class LayerRecord:
    """The routing of one MoE layer, or of one projection with banks of experts, in one forward pass.

    Its tensors are part of the autograd graph.
    """

    layer: int
    """Index of the decoder layer, -1 if it was not set."""
    routing: Routing
    ctx: Context
    """Context of the tokens during the forward pass."""
    projection: str = ""
    """Name of the projection, empty for an MoE layer."""

    @property
    def real_T(self) -> Tensor | None:
        """[T] bool, False where the token is padding; None when nothing is padded."""
        pad_T = self.ctx.pad_T
        return None if pad_T is None else ~pad_T.reshape(-1).bool()

    @property
    def tokens(self) -> Tensor:
        """0-d float number of tokens that are not padding."""
        real_T = self.real_T
        if real_T is None:
            return torch.tensor(float(self.routing.num_tokens), device=self.routing.logits_TE.device)
        return real_T.sum().float()

    def total(self, values_TX: Tensor) -> Tensor:
        """[X] sum of the values of tokens that are not padding."""
        real_T = self.real_T
        return (values_TX if real_T is None else values_TX * real_T[:, None].to(values_TX.dtype)).sum(dim=0)


_NOTHING_KNOWN = Context()
_context: ContextVar[Context] = ContextVar("unimoe_routing_context", default=_NOTHING_KNOWN)
_records: ContextVar[list[LayerRecord] | None] = ContextVar("unimoe_routing_records", default=None)


@contextmanager
def routing_context(ctx: Context) -> Iterator[Context]:
    """Gives the routers inside information about the tokens, and an empty ``carry``."""
    ctx = replace(ctx, carry={})
    token = _context.set(ctx)
    try:
        yield ctx
    finally:
        _context.reset(token)


@contextmanager
def record() -> Iterator[list[LayerRecord]]:
    """Collects a LayerRecord for each forward pass of an MoE layer inside, in order; nested recorders all
    collect."""
    records: list[LayerRecord] = []
    outer = _records.get()
    token = _records.set(records)
    try:
        yield records
    finally:
        _records.reset(token)
        if outer is not None:
            outer.extend(records)


@contextmanager
def unrecorded() -> Iterator[None]:
    """Inside, forward passes leave no records: those that are beside the one that answers."""
    token = _records.set(None)
    try:
        yield
    finally:
        _records.reset(token)


def remember_context(model: nn.Module) -> None:
    """Make gradient checkpointing run the layers of ``model`` again as they ran first.

    The second run, in the backward pass, gets the context variables of the first, so that a router that reads
    its context chooses the same experts, and it records nothing. Call it after checkpointing was enabled on a
    model of transformers; models of this package do so themselves. Repeated calls have no effect.
    """
    module: Any  # torch.nn knows tensors and modules as attributes
    for module in model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if checkpoint is not None and not isinstance(checkpoint, _RememberContext):
            module._gradient_checkpointing_func = _RememberContext(checkpoint)


class _RememberContext:
    """A checkpointing function whose second run sees the context variables of the first."""

    def __init__(self, checkpoint: Callable[..., Any]):
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        context, runs = copy_context(), 0
        carry = dict(current_context().carry or {})  # of the layers before; the second run finds all layers'

        def run(*inputs: Any, **options: Any) -> Any:
            nonlocal runs
            runs += 1
            if runs == 1:
                return function(*inputs, **options)
            # a copy, since several threads may run backward passes through one graph
            return context.copy().run(_again, carry, function, *inputs, **options)

        return self.checkpoint(run, *args, **kwargs)


def _again(carry: dict[str, Tensor], function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    _records.set(None)
    _context.set(replace(_context.get(), carry=dict(carry)))
    return function(*inputs, **options)


def current_context() -> Context:
    """The innermost ``routing_context``, or an empty one."""
    return _context.get()


def recording() -> bool:
    """Whether a ``record()`` is open."""
    return _records.get() is not None


def append(layer: int, routing: Routing, projection: str = "") -> None:
    """Adds a record to the active ``record()``, if there is one."""
    records = _records.get()
    if records is not None:
        records.append(LayerRecord(layer, routing, _context.get(), projection))
