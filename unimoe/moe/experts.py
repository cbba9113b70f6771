"""Experts: what the rows of a Routing go through.

Shapes: T tokens, N (token, expert) pairs sorted by expert, E experts, D = H hidden, I intermediate.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from unimoe.errors import UserError
from unimoe.kernels.ffn import ACTS, ffn_experts, ffn_mix
from unimoe.kernels.swiglu import swiglu_experts, swiglu_mix

from .routing import Routing


@dataclass(frozen=True)
class Origin:
    """How experts came out of dense FFNs."""

    kind: str
    """copy, dense (a dense model per expert) or slice"""
    exact: bool
    """Whether the MoE layer gives the dense FFN's output at the start."""
    when: str
    """The condition under which it does, or why it does not."""


class Experts(nn.Module):
    """E functions of a row; subclasses define ``forward``, and ``mix`` where they can share work between a
    token's experts."""

    num_experts: int

    def forward(self, x_ND: Tensor, offsets_E1: Tensor, weight_N: Tensor | None = None) -> Tensor:
        """[N, D] rows grouped by expert -> [N, D], each row's output times its weight."""
        raise TypeError(
            f"{type(self).__name__} has no forward: Experts must define forward(x_ND, offsets_E1, weight_N)"
        )

    def mix(self, x_TD: Tensor, routing: Routing, weight_N: Tensor) -> Tensor:
        """[T, D] tokens -> [T, D]: every token's experts, weighted and summed; a token without experts gets
        zeros."""
        y_ND = self(x_TD.index_select(0, routing.token_N), routing.offsets_E1, weight_N)
        return torch.zeros_like(x_TD, dtype=y_ND.dtype).index_add(0, routing.token_N, y_ND)


def local(stack: Tensor) -> Tensor:
    """This process's experts of a stack that is divided among several, else the stack as it is."""
    return stack.to_local() if isinstance(stack, DTensor) else stack


class SwiGLUExperts(Experts):
    """E bias-free SwiGLU FFNs (Shazeer, arXiv 2002.05202) as two stacked parameters in transformers' layout.

    gate_up_proj [E, 2I, H] holds the gate rows first, down_proj is [E, H, I].
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        act: str = "silu",
        init_std: float = 0.02,
    ):
        super().__init__()
        if act not in ("silu", "swish"):
            raise UserError(f"SwiGLU experts got the activation {act!r}, expected silu")
        self.num_experts, self.hidden_size, self.intermediate_size = (
            num_experts,
            hidden_size,
            intermediate_size,
        )
        self.init_std = init_std
        self.origin: Origin | None = None
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.gate_up_proj, std=self.init_std)
        nn.init.normal_(self.down_proj, std=self.init_std)

    def forward(self, x_ND: Tensor, offsets_E1: Tensor, weight_N: Tensor | None = None) -> Tensor:
        return swiglu_experts(x_ND, offsets_E1, local(self.gate_up_proj), local(self.down_proj), weight_N)

    def mix(self, x_TD: Tensor, routing: Routing, weight_N: Tensor) -> Tensor:
        stacks = local(self.gate_up_proj), local(self.down_proj)
        return swiglu_mix(x_TD, routing.token_N, routing.offsets_E1, *stacks, weight_N)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, hidden={self.hidden_size}, intermediate={self.intermediate_size}"


class FFNExperts(Experts):
    """E two-layer FFNs with biases, act(x Wu^T + bu) Wd^T + bd, as four stacked parameters.

    up_proj [E, I, H], up_bias [E, I], down_proj [E, H, I], down_bias [E, H]. ``act`` is ``relu`` (detection
    transformers) or ``gelu``. The routing weight multiplies the whole output, biases included.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        act: str = "relu",
        init_std: float = 0.02,
    ):
        super().__init__()
        if act not in ACTS:
            raise UserError(f"FFN experts got the activation {act!r}, expected one of {', '.join(ACTS)}")
        self.num_experts, self.hidden_size, self.intermediate_size = (
            num_experts,
            hidden_size,
            intermediate_size,
        )
        self.act, self.init_std = act, init_std
        self.origin: Origin | None = None
        self.up_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.up_bias = nn.Parameter(torch.empty(num_experts, intermediate_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.down_bias = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights N(0, init_std), biases zero."""
        for weight, bias in ((self.up_proj, self.up_bias), (self.down_proj, self.down_bias)):
            nn.init.normal_(weight, std=self.init_std)
            nn.init.zeros_(bias)

    def forward(self, x_ND: Tensor, offsets_E1: Tensor, weight_N: Tensor | None = None) -> Tensor:
        return ffn_experts(x_ND, offsets_E1, *self._stacks(), self.act, weight_N)

    def mix(self, x_TD: Tensor, routing: Routing, weight_N: Tensor) -> Tensor:
        return ffn_mix(x_TD, routing.token_N, routing.offsets_E1, *self._stacks(), self.act, weight_N)

    def _stacks(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return local(self.up_proj), local(self.up_bias), local(self.down_proj), local(self.down_bias)

    def extra_repr(self) -> str:
        sizes = (
            f"experts={self.num_experts}, hidden={self.hidden_size}, intermediate={self.intermediate_size}"
        )
        return f"{sizes}, act={self.act}"
