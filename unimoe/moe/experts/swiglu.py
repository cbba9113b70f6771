"""Gated FFNs without biases, as LLMs have them.

Shapes: T tokens, N (token, expert) pairs sorted by expert, E experts, D = H hidden, I intermediate.
"""

import torch
from torch import Tensor, nn

from unimoe.kernels.lora import Adapters, fused_lora_experts
from unimoe.kernels.swiglu import check_gate, fused_experts
from unimoe.moe.routing import Routing

from .base import Experts, local


class SwiGLUExperts(Experts):
    """E bias-free SwiGLU FFNs (Shazeer, arXiv 2002.05202) as two stacked parameters in transformers' layout.

    gate_up_proj [E, 2I, H] holds the gate rows first, down_proj is [E, H, I]. ``act`` is ``silu``; GeGLU has
    ``gelu`` (exact) or, in Gemma, ``gelu_tanh``.
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
        self.act = "silu" if act == "swish" else act
        check_gate(self.act)
        self.num_experts, self.hidden_size, self.intermediate_size = (
            num_experts,
            hidden_size,
            intermediate_size,
        )
        self.init_std = init_std
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.gate_up_proj, std=self.init_std)
        nn.init.normal_(self.down_proj, std=self.init_std)

    def forward(
        self,
        x_TD: Tensor,
        routing: Routing,
        weight_N: Tensor,
        adapters: Adapters | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """Run the experts as :class:`Experts` says.

        ``adapters`` add ``scale`` times a low-rank product to the weights of each expert (see LoRAExperts).
        """
        stacks, token_N = (local(self.gate_up_proj), local(self.down_proj)), routing.token_N
        if adapters is None:
            return fused_experts(x_TD, routing.offsets_E1, *stacks, weight_N, token_N, self.act)
        lora = (adapters, scale, weight_N, token_N, self.act)
        return fused_lora_experts(x_TD, routing.offsets_E1, *stacks, *lora)

    def extra_repr(self) -> str:
        sizes = (
            f"experts={self.num_experts}, hidden={self.hidden_size}, intermediate={self.intermediate_size}"
        )
        return sizes if self.act == "silu" else f"{sizes}, act={self.act}"
