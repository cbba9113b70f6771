"""Hooks that rewrite what the routers of any model decide.

Shapes: T tokens, D hidden, E experts, K slots of a token.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from unimoe.errors import UserError
from unimoe.moe.hf import takes_sentinels
from unimoe.moe.layer import MoELayer
from unimoe.moe.routing import Routing
from unimoe.moe.slots import of_slots, slots
from unimoe.moe.view import MoEView

Rewrite = Callable[[MoEView, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""``fn(layer, x_TD, index_TK, weight_TK) -> (index_TK, weight_TK)``."""


@contextmanager
def route(layers: Sequence[MoEView], fn: Rewrite) -> Iterator[None]:
    """Inside, ``fn`` rewrites each routing between router and experts.

    ``fn(layer, x_TD, index_TK, weight_TK)`` returns the new index [T, K'] and weights [T, K']; an index of
    ``layer.num_experts`` skips. Where the experts cannot take such an index (gpt-oss, batched products), the
    slot gets weight 0 instead, which computes as much and gives the same.
    """
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(rewrite(layer, fn).remove)
        yield


def rewrite(layer: MoEView, fn: Rewrite) -> RemovableHandle:
    """The hook of :func:`route` on one layer, until its handle is removed."""
    if isinstance(layer.block, MoELayer):

        def after_router(router: nn.Module, args: tuple[Any, ...], routing: Routing) -> Routing:
            before = slots(routing)
            after = fn(layer, args[0], *before)
            return routing if after[0] is before[0] and after[1] is before[1] else of_slots(routing, *after)

        return layer.router.register_forward_hook(after_router)

    def before_experts(experts: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x_TD, index_TK, weight_TK, *rest = args
        index_TK, weight_TK = fn(layer, x_TD, index_TK, weight_TK)
        if not takes_sentinels(experts):
            skip_TK = index_TK >= experts.num_experts  # type: ignore[operator]
            index_TK, weight_TK = index_TK.masked_fill(skip_TK, 0), weight_TK.masked_fill(skip_TK, 0)
        return (x_TD, index_TK, weight_TK, *rest)

    return layer.experts.register_forward_pre_hook(before_experts)


@contextmanager
def choose(layers: Sequence[MoEView], fn: Callable[[MoEView, Tensor], Tensor]) -> Iterator[None]:
    """Inside, ``fn(layer, logits_TE) -> logits_TE`` changes the logits that each router chooses by: a mask, a
    shift, which may train.

    It acts on the one linear layer that every router of transformers, and each of ours with ``expert_rows``,
    begins with.
    """
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(_choose_by(layer, fn))
        yield


def _choose_by(layer: MoEView, fn: Callable[[MoEView, Tensor], Tensor]) -> Callable[[], None]:
    router: Any = layer.router
    inner, had = router.forward, "forward" in vars(router)

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Linear(lambda logits_TE: fn(layer, logits_TE)) as mode:
            found = inner(*args, **kwargs)
        if not mode.done:
            raise UserError(
                f"{layer.name}: {type(router).__name__} has no linear layer whose logits it chooses by"
            )
        return found

    def restore() -> None:
        if had:
            router.forward = inner
        else:
            del router.forward

    router.forward = forward  # few_rows.py sees it, and leaves the layer to this router
    return restore


class _Linear(TorchFunctionMode):
    """Changes the output of the first linear layer inside."""

    def __init__(self, fn: Callable[[Tensor], Tensor]):
        super().__init__()
        self.fn, self.done = fn, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is F.linear and not self.done:
            self.done = True
            found = self.fn(found)
        return found
