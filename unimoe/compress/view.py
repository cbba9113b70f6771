"""The MoE layers of any model, found by looking, and hooks that rewrite what their routers decide.

All MoE models of transformers 5 call ``experts(hidden, index, weights)`` with these three in this order,
after a sibling named ``gate`` or ``router``; ours call ``experts(x_TD, routing, weight_N)``. Nothing else is
assumed.

Shapes: T tokens, D hidden, E experts, K slots of a token, I inner width of an expert, N (token, expert)
pairs.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from unimoe.errors import UserError
from unimoe.moe.hf import takes_sentinels
from unimoe.moe.layer import MoELayer
from unimoe.moe.routing import Pairs, Routing, sort_by_expert

STACKS = (
    "gate_up_proj",
    "gate_up_proj_bias",
    "up_proj",
    "up_bias",
    "down_proj",
    "down_proj_bias",
    "down_bias",
)
"""Names of the parameters that hold one row for each expert."""


@dataclass(frozen=True, eq=False)
class MoEView:
    """One MoE layer of any model; nothing is copied."""

    index: int
    """Position among the MoE layers of the model."""
    name: str
    """Path of the block in the model."""
    block: nn.Module
    router: nn.Module
    experts: nn.Module
    shared: nn.Module | None
    """The experts that every token visits."""
    num_experts: int
    """Experts with weights."""
    top_k: int
    """Experts that a token visits; for a router that varies it, the expected number, rounded up."""
    groups: int
    """Groups of neighbouring experts of a group-limited router, else 1."""
    parent: nn.Module
    """The decoder layer around the block."""

    @property
    def layer(self) -> int:
        """Index of the decoder layer, which records also have: the last number of the path, where the layer
        does not know it."""
        if (own := getattr(self.block, "layer_index", -1)) >= 0:
            return own
        numbers = re.findall(r"\d+", self.name)
        return int(numbers[-1]) if numbers else self.index

    @property
    def ours(self) -> bool:
        """Whether it is a layer of this package."""
        return isinstance(self.block, MoELayer)

    def stacks(self) -> dict[str, Tensor]:
        """The parameters with one row for each expert, as they are.

        Raises:
            UserError: the experts are not plain stacks of floats.
        """
        own = dict(self.experts.named_parameters(recurse=False))
        if not own or set(own) - set(STACKS) or "down_proj" not in own:
            raise UserError(
                f"{self.name}: {type(self.experts).__name__} are no plain stacks of weights, expected SwiGLU "
                "experts or two-layer FFNs"
            )
        return own

    def router_rows(self) -> Tensor:
        """[E, D] what the router holds of each expert.

        Raises:
            UserError: the router has no such rows.
        """
        weight = getattr(self.router, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            raise UserError(f"{self.name}: {type(self.router).__name__} has no row for each expert")
        return weight

    def expert(self, index: int) -> dict[str, Tensor]:
        """Views of one expert's matrices in one orientation: ``gate`` [I, D] where there is one, ``up``
        [I, D], ``down`` [D, I]. Writing to them changes the model.

        Raises:
            UserError: the experts are not plain stacks of floats.
        """
        stacks = self.stacks()
        turned = bool(getattr(self.experts, "is_transposed", False))
        down = stacks["down_proj"][index].T if turned else stacks["down_proj"][index]
        if "up_proj" in stacks:
            return {"up": stacks["up_proj"][index].T if turned else stacks["up_proj"][index], "down": down}
        both = stacks["gate_up_proj"][index].T if turned else stacks["gate_up_proj"][index]
        if getattr(self.experts, "is_concatenated", True):
            gate, up = both.chunk(2)
        else:
            gate, up = both[::2], both[1::2]
        return {"gate": gate, "up": up, "down": down}


def view(model: nn.Module) -> list[MoEView]:
    """The MoE layers of a model, in order.

    Raises:
        UserError: it has none.
    """
    found = find_layers(model)
    if not found:
        raise UserError(f"{type(model).__name__} has no MoE layers; expected a mixture of experts")
    return found


def expert_counts(model: nn.Module) -> dict[int, int]:
    """Index of the decoder layer -> experts with weights."""
    return {layer.layer: layer.num_experts for layer in find_layers(model)}


def find_layers(model: nn.Module) -> list[MoEView]:
    """As :func:`view`; empty for a dense model."""
    found: list[MoEView] = []
    for name, block in model.named_modules():
        parts = _ours(block) if isinstance(block, MoELayer) else _stock(block)
        if parts is not None:
            parent = model.get_submodule(name.rpartition(".")[0])
            found.append(MoEView(len(found), name, block, *parts, parent))
    return found


Parts = tuple[nn.Module, nn.Module, nn.Module | None, int, int, int]


def _ours(block: MoELayer) -> Parts:
    router: Any = block.router
    groups = getattr(router, "groups", None)
    top_k = getattr(router, "k", None)
    if top_k is None:  # another number for each token, which a router tells by its values
        meta = next(block.parameters()).is_meta
        top_k = block.num_experts if meta else -int(-block.experts_per_token // 1)
    groups = groups if isinstance(groups, int) else 1
    return router, block.experts, block.shared, block.num_experts, top_k, groups


def _stock(block: nn.Module) -> Parts | None:
    experts = getattr(block, "experts", None)
    count = getattr(experts, "num_experts", None)
    if not isinstance(experts, nn.Module) or not isinstance(count, int):
        return None
    rows = len(merge_map(experts) or range(count))
    for name in ("gate", "router"):  # not forget_gate, nor shared_expert_gate
        router = getattr(block, name, None)
        weight = getattr(router, "weight", None)
        if isinstance(router, nn.Module) and isinstance(weight, Tensor) and weight.shape[:-1] == (rows,):
            break
    else:
        return None
    found = [getattr(block, name, None) for name in ("shared_expert", "shared_experts", "shared_mlp")]
    shared = next((one for one in found if isinstance(one, nn.Module)), None)
    top_k = getattr(router, "top_k", None) or getattr(block, "top_k", None)
    assert isinstance(top_k, int), type(router)
    grouped = getattr(router, "topk_method", "group_limited_greedy") == "group_limited_greedy"
    groups = getattr(router, "num_group", None) if grouped else None
    return router, experts, shared, count, top_k, groups or 1


def merge_map(experts: nn.Module) -> list[int] | None:
    """Of experts that were merged: for each expert that the router knows the one that stands in for it."""
    return getattr(experts, "merge_map", None)


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
