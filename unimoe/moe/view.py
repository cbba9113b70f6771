"""The MoE layers of any model, found by looking.

All MoE models of transformers 5 call ``experts(hidden, index, weights)`` with these three in this order,
after a sibling named ``gate`` or ``router``; ours call ``experts(x_TD, routing, weight_N)``. Nothing else is
assumed.

Shapes: D hidden, E experts, I inner width of an expert.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from unimoe.errors import UserError

from .layer import MoELayer

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
            UserError: the experts are not stacked weight tensors.
        """
        own: dict[str, Tensor] = dict(self.experts.named_parameters(recurse=False))
        if not own or set(own) - set(STACKS) or "down_proj" not in own:
            raise UserError(
                f"{self.name}: {type(self.experts).__name__} are not stacked weight tensors, expected SwiGLU "
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
            UserError: the experts are not stacked weight tensors.
        """
        matrices = {name: stack[index] for name, stack in self.stacks().items() if name.endswith("_proj")}
        if getattr(self.experts, "is_transposed", False):
            matrices = {name: matrix.T for name, matrix in matrices.items()}
        if "up_proj" in matrices:
            return {"up": matrices["up_proj"], "down": matrices["down_proj"]}
        both, down = matrices["gate_up_proj"], matrices["down_proj"]
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
    """Find the layers that :func:`view` gives; none in a dense model."""
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
    described = router.describe()
    top_k = described.experts_per_token if described.fixed else block.experts_per_token
    groups = groups if isinstance(groups, int) else 1
    return router, block.experts, block.shared, block.num_experts, math.ceil(top_k), groups


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
    """Map of merged experts: for each expert that the router knows the one that stands in for it."""
    return getattr(experts, "merge_map", None)
