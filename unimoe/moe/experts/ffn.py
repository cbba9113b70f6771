"""Two-layer FFNs with biases, as detection transformers have them.

Shapes: T tokens, N (token, expert) pairs sorted by expert, E experts, D = H hidden, I intermediate.
"""

import torch
from torch import Tensor, nn

from unimoe.errors import UserError
from unimoe.kernels.ffn import ACTS, fused_ffn_experts
from unimoe.moe.routing import Routing

from .base import Experts, local


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

    def forward(self, x_TD: Tensor, routing: Routing, weight_N: Tensor) -> Tensor:
        up, down = local(self.up_proj), local(self.down_proj)
        up_bias, down_bias = local(self.up_bias), local(self.down_bias)
        return fused_ffn_experts(
            x_TD, routing.offsets_E1, up, up_bias, down, down_bias, self.act, weight_N, routing.token_N
        )

    def extra_repr(self) -> str:
        sizes = (
            f"experts={self.num_experts}, hidden={self.hidden_size}, intermediate={self.intermediate_size}"
        )
        return f"{sizes}, act={self.act}"
