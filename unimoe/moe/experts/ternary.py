"""SwiGLU FFNs with ternary weights and 8-bit activations.

Shapes: T tokens, N (token, expert) pairs sorted by expert, E experts, D = H hidden, I intermediate, X any.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimoe.kernels.arguments import one_by_one
from unimoe.kernels.swiglu import GATES, check_gate
from unimoe.moe.routing import Routing

from .base import Experts, local


class TernaryExperts(Experts):
    """E bias-free SwiGLU FFNs whose matrices have the values -a, 0 and a, a of each matrix its mean absolute
    weight, and whose inputs have 8 bits a token (MoTE, arXiv 2506.14435; quantizers of BitNet b1.58, arXiv
    2402.17764, eq. 1-3).

    gate_up_proj [E, 2I, H] (gate rows first) and down_proj [E, H, I] are full-precision weights that are
    quantized in every forward pass; the gradient passes through as if they were not. :meth:`pack` replaces
    them by codes of 2 bits, for inference.
    """

    gate_up_codes: Tensor
    gate_up_scale: Tensor
    down_codes: Tensor
    down_scale: Tensor

    def __init__(self, gate_up_EFH: Tensor, down_EHI: Tensor, act: str = "silu", init_std: float = 0.02):
        super().__init__()
        self.num_experts, self.hidden_size, self.intermediate_size = down_EHI.shape
        check_gate(act)
        self.act, self.init_std = act, init_std
        self.gate_up_proj, self.down_proj = nn.Parameter(gate_up_EFH), nn.Parameter(down_EHI)

    @property
    def packed(self) -> bool:
        return "gate_up_codes" in self._buffers

    def reset_parameters(self) -> None:
        for weight in self.parameters():  # none once they are packed
            nn.init.normal_(weight, std=self.init_std)

    def forward(self, x_TD: Tensor, routing: Routing, weight_N: Tensor) -> Tensor:
        stacks = [stack.to(x_TD.dtype) for stack in self.ternary_weights()]
        y_ND = one_by_one(self._expert, int8(x_TD)[routing.token_N], routing.offsets_E1, stacks, weight_N)
        return torch.zeros_like(x_TD, dtype=y_ND.dtype).index_add(0, routing.token_N, y_ND)

    def _expert(self, x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        return F.linear(int8(GATES[self.act](gate) * up), down) * weight

    def ternary_weights(self) -> tuple[Tensor, Tensor]:
        """[E, 2I, H] and [E, H, I]: the quantized weights."""
        if self.packed:
            gate_up = unpack(self.gate_up_codes, self.hidden_size).float() * self.gate_up_scale
            return gate_up.flatten(1, 2), unpack(self.down_codes, self.intermediate_size) * self.down_scale
        gate_up = ternary(local(self.gate_up_proj).unflatten(1, (2, -1)))
        return gate_up.flatten(1, 2), ternary(local(self.down_proj))

    @torch.no_grad()
    def pack(self) -> None:
        """Replace the full-precision weights by what a forward pass makes of them, 2 bits a weight and one
        float32 a matrix; nothing trains any more."""
        for name, weight in (("gate_up", self.gate_up_proj.unflatten(1, (2, -1))), ("down", self.down_proj)):
            scale = absmean(weight)
            self.register_buffer(f"{name}_codes", pack(_codes(weight, scale)))
            self.register_buffer(f"{name}_scale", scale.float())
        del self.gate_up_proj, self.down_proj
        self.indivisible = "are packed for inference"

    def stored_bytes(self) -> int:
        """Bytes of the packed experts."""
        rows, matrices = 2 * self.intermediate_size * -(-self.hidden_size // 4), 3 * 4
        return self.num_experts * (rows + self.hidden_size * -(-self.intermediate_size // 4) + matrices)

    def extra_repr(self) -> str:
        sizes = f"experts={self.num_experts}, hidden={self.hidden_size}"
        return f"{sizes}, intermediate={self.intermediate_size}, packed={self.packed}"


def absmean(weight_XIJ: Tensor) -> Tensor:
    """[X, 1, 1] mean absolute value of each matrix."""
    return weight_XIJ.detach().abs().mean(dim=(-2, -1), keepdim=True).clamp(min=1e-5)


def _codes(weight_XIJ: Tensor, scale_X11: Tensor) -> Tensor:
    return (weight_XIJ / scale_X11).round().clamp(-1, 1)


def ternary(weight_XIJ: Tensor) -> Tensor:
    """Each matrix rounded to -a, 0 or a; the gradient is that of the identity."""
    scale_X11 = absmean(weight_XIJ)
    return (scale_X11 * _codes(weight_XIJ.detach(), scale_X11)) + (weight_XIJ - weight_XIJ.detach())


def int8(x_TD: Tensor) -> Tensor:
    """Each token rounded to the 255 values between its largest absolute entry and minus that; the gradient is
    that of the identity."""
    step_T1 = x_TD.detach().abs().amax(dim=-1, keepdim=True).clamp(min=1e-5) / 127
    return (x_TD.detach() / step_T1).round() * step_T1 + (x_TD - x_TD.detach())


def pack(codes_XJ: Tensor) -> Tensor:
    """Codes -1, 0 and 1 [..., J] as bytes of four [..., ceil(J / 4)]."""
    padded = F.pad((codes_XJ + 1).to(torch.uint8), (0, -codes_XJ.shape[-1] % 4))
    one, two, three, four = padded.unflatten(-1, (-1, 4)).unbind(-1)
    return one | two << 2 | three << 4 | four << 6


def unpack(bytes_XB: Tensor, width: int) -> Tensor:
    """Codes [..., ``width``], int8, of what :func:`pack` returned."""
    four = torch.stack([bytes_XB >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1)
    return four.flatten(-2)[..., :width].to(torch.int8) - 1
