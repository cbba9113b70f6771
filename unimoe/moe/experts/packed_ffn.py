"""Two-layer FFNs with biases whose weights are packed: those of a detector.

Shapes: T tokens, E experts, D = H hidden, I intermediate.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unimoe.kernels import packed as kernel
from unimoe.kernels.arguments import groups
from unimoe.kernels.ffn import ACTS
from unimoe.moe.routing import Routing

from .ffn import FFNExperts
from .packed_stacks import Codes, PackedStacks, Sizes


class PackedFFNExperts(PackedStacks):
    """E two-layer FFNs with packed weights, in place of :class:`FFNExperts`; biases stay as they are.

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        bits: of each expert, or one number for all.
        group: neighbouring weights of a row that share a scale; divides H and I.
        act: between the layers (:data:`unimoe.kernels.ffn.ACTS`).

    Raises:
        UserError: the group does not divide a width, there are no such bits, or not one for each expert.
    """

    up_bias: nn.Parameter
    down_bias: nn.Parameter

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        bits: int | Sequence[int],
        group: int = 64,
        act: str = "relu",
    ):
        super().__init__(num_experts, hidden_size, intermediate_size, bits, group, act)
        for name, rows, _, _ in self.sizes():
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(num_experts, rows)))

    @classmethod
    @torch.no_grad()
    def from_experts(
        cls,
        experts: FFNExperts,
        bits: int | Sequence[int],
        group: int = 64,
        codes: tuple[Codes, Codes] | None = None,
    ) -> "PackedFFNExperts":
        """Pack trained experts.

        Args:
            experts: whose weights are packed; the biases are shared with them.
            bits: of each expert, or one number for all.
            group: neighbouring weights of a row that share a scale.
            codes: those of up_proj [E, I, H] and down_proj [E, H, I], where they were quantized elsewhere;
                None rounds to nearest.

        Raises:
            UserError: bits or a group that cannot be packed.
        """
        E, H, inner = experts.down_proj.shape
        with torch.device(experts.down_proj.device):
            self = cls(E, H, inner, bits, group, experts.act)
        self.up_bias, self.down_bias = experts.up_bias, experts.down_bias
        if experts.down_proj.is_meta:
            return self
        self.fill((experts.up_proj, experts.down_proj), codes)
        return self

    def sizes(self) -> tuple[Sizes, Sizes]:
        H, inner = self.hidden_size, self.intermediate_size
        return Sizes("up", inner, H), Sizes("down", H, inner)

    def forward(self, x_TD: Tensor, routing: Routing, weight_N: Tensor) -> Tensor:
        up, down = self.stacks()
        y_TD = torch.zeros_like(x_TD)
        for e, start, end in groups(routing.offsets_E1.tolist()):
            token_n = routing.token_N[start:end]
            inner = ACTS[self.act](kernel.linear(x_TD[token_n], up, self.up_bias[e], e=e))
            y = kernel.linear(inner, down, self.down_bias[e], e=e)
            y_TD = y_TD.index_add(0, token_n, y * weight_N[start:end, None].to(y.dtype))
        return y_TD

    def active_parameters(self, visits: float) -> float:
        biases = self.num_experts * (self.hidden_size + self.intermediate_size)
        return visits * (self.num_weights + biases) / self.num_experts

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act}"
