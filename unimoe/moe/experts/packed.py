"""Experts whose weights are packed: 1, 2, 3, 4 or 8 bits a weight.

They compute without unpacking to memory (:mod:`unimoe.kernels.packed`), save codes and scales as buffers, and
can be built on the meta device. Nothing in them trains, but gradients pass through to what is below.

Shapes: T tokens, K experts of a token, N (token, expert) pairs sorted by expert, E experts, D = H hidden,
I intermediate, O outputs, G groups of a row.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unimoe.errors import UserError
from unimoe.kernels import packed as kernel
from unimoe.kernels.swiglu import check_gate
from unimoe.moe.hf import unusual_layout
from unimoe.moe.routing import Routing, sort_by_expert

from .base import Experts
from .swiglu import SwiGLUExperts

Codes = tuple[Tensor, Tensor]
"""Codes int8 [..., O, K] and scales [..., O, G] of one stack of weights."""
ACTS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}
"""Names of activations by their classes in torch and transformers."""


class PackedExperts(Experts):
    """E bias-free gated FFNs with packed weights, each expert with bits of its own.

    Takes the place of :class:`SwiGLUExperts`, and of the experts of transformers' models.

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        bits: of each expert, or one number for all.
        group: neighbouring weights of a row that share a scale; divides H and I.
        act: of the gate (:data:`unimoe.kernels.swiglu.GATES`).
        nested: codes can be cut to fewer bits (:func:`unimoe.kernels.packed.planes`).

    Raises:
        UserError: the group does not divide a width, or there are no such bits.
    """

    indivisible = "are packed for inference"
    gate_up_codes: Tensor
    gate_up_scales: Tensor
    down_codes: Tensor
    down_scales: Tensor
    bits: Tensor

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        bits: int | Sequence[int],
        group: int = 64,
        act: str = "silu",
        nested: bool = False,
    ):
        super().__init__()
        check_gate(act)
        self.num_experts, self.hidden_size, self.intermediate_size = (
            num_experts,
            hidden_size,
            intermediate_size,
        )
        self.expert_bits = (bits,) * num_experts if isinstance(bits, int) else tuple(bits)
        if len(self.expert_bits) != num_experts:
            raise UserError(
                f"packed experts got bits for {len(self.expert_bits)} experts, expected {num_experts}"
            )
        self.group, self.act, self.nested = group, act, nested
        self.level = 0
        """Bits of each code that count; 0 for all."""
        kernel.check(self.expert_bits, group, hidden_size, intermediate_size)
        gate_up = kernel.Stack.empty(
            self.expert_bits, 2 * intermediate_size, hidden_size, group, nested, halves=2
        )
        down = kernel.Stack.empty(self.expert_bits, hidden_size, intermediate_size, group, nested)
        for name, stack in (("gate_up", gate_up), ("down", down)):
            self.register_buffer(f"{name}_codes", stack.codes)
            self.register_buffer(f"{name}_scales", stack.scales)
        self.register_buffer("bits", torch.tensor(self.expert_bits, dtype=torch.uint8))

    @classmethod
    @torch.no_grad()
    def from_experts(
        cls,
        experts: nn.Module,
        bits: int | Sequence[int],
        group: int = 64,
        codes: tuple[Codes, Codes] | None = None,
        nested: bool = False,
    ) -> "PackedExperts":
        """Pack trained experts.

        Args:
            experts: :class:`SwiGLUExperts`, or those of a model of transformers with the same layout.
            bits: of each expert, or one number for all.
            group: neighbouring weights of a row that share a scale.
            codes: those of gate_up_proj [E, 2I, H] and down_proj [E, H, I], where they were quantized
                elsewhere; None rounds to nearest.
            nested: codes can be cut to fewer bits.

        Raises:
            UserError: other experts, bits or a group that cannot be packed.
        """
        gate_up, down, act = weights_of(experts)
        E, H, inner = down.shape
        with torch.device(gate_up.device):
            self = cls(E, H, inner, bits, group, act, nested)
        if gate_up.is_meta:
            return self
        for stack, weights, given in zip(self.stacks(), (gate_up, down), codes or (None, None), strict=True):
            for e, one in enumerate(self.expert_bits):
                if given is None:
                    stack.fill(e, *kernel.quantize_rtn(weights[e], one, group))
                else:
                    stack.fill(e, given[0][e], given[1][e])
        return self

    def stacks(self) -> tuple[kernel.Stack, kernel.Stack]:
        """gate_up and down: what is in this module's buffers."""
        buffers: dict[str, Any] = self._buffers
        H, inner, rest = self.hidden_size, self.intermediate_size, (self.group, self.nested)
        gate_up = (buffers["gate_up_codes"], buffers["gate_up_scales"], self.expert_bits, 2 * inner, H)
        down = (buffers["down_codes"], buffers["down_scales"], self.expert_bits, H, inner)
        return kernel.Stack(*gate_up, *rest, halves=2), kernel.Stack(*down, *rest)

    def forward(  # type: ignore[override]  (weights are [N] or [T, K])
        self, x_TD: Tensor, routing: Routing | Tensor, weight: Tensor
    ) -> Tensor:
        """[T, D] -> [T, D].

        ``routing`` and ``weight`` [N] are those of :class:`Experts`; or, as transformers' blocks call theirs,
        experts [T, K] and weights [T, K]. Experts >= E add nothing.
        """
        token_N, offsets_E1, weight_N = self.pairs(routing, weight)
        return kernel.fused_experts(
            x_TD, token_N, offsets_E1, weight_N, *self.stacks(), self.bits, self.act, self.level
        )

    def pairs(self, routing: Routing | Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [N] of the pairs, sorted by expert, where each expert's begin [E + 1], and weights [N]; of
        the arguments of :meth:`forward`. Pairs behind the last expert's add nothing."""
        if isinstance(routing, Routing):
            return routing.token_N, routing.offsets_E1, weight
        slot_N, token_N, _, offsets_E1 = sort_by_expert(routing, self.num_experts)
        return token_N, offsets_E1, weight.reshape(-1).index_select(0, slot_N)

    @torch.no_grad()
    def as_nested(self) -> "PackedExperts":
        """These experts with the same codes, laid out so that they can be cut to fewer bits."""
        with torch.device(self.gate_up_codes.device):
            new = PackedExperts(
                self.num_experts,
                self.hidden_size,
                self.intermediate_size,
                self.expert_bits,
                self.group,
                self.act,
                nested=True,
            )
        if not self.gate_up_codes.is_meta:
            for old, stack in zip(self.stacks(), new.stacks(), strict=True):
                for e in range(self.num_experts):
                    stack.fill(e, *old.unpack(e))
        return new

    @property
    def num_weights(self) -> int:
        """Weights that are packed here."""
        return 3 * self.num_experts * self.hidden_size * self.intermediate_size

    def active_parameters(self, visits: float) -> float:
        return visits * self.num_weights / self.num_experts

    def extra_repr(self) -> str:
        bits = sorted(set(self.expert_bits))
        sizes = f"experts={self.num_experts}, hidden={self.hidden_size}"
        return f"{sizes}, intermediate={self.intermediate_size}, bits={bits}, group={self.group}"


def weights_of(experts: nn.Module) -> tuple[Tensor, Tensor, str]:
    """gate_up [E, 2I, H], down [E, H, I] and the activation of experts that can be packed.

    Raises:
        UserError: others, such as two-layer FFNs or those with biases.
    """
    kind = type(experts).__name__
    if isinstance(experts, Experts):
        if type(experts) is not SwiGLUExperts:
            raise UserError(f"{kind} cannot be packed, expected SwiGLUExperts")
        return experts.gate_up_proj, experts.down_proj, experts.act
    gate_up: Any = getattr(experts, "gate_up_proj", None)
    down: Any = getattr(experts, "down_proj", None)
    act = ACTS.get(type(getattr(experts, "act_fn", None)).__name__)
    reason = unusual_layout(experts)
    if not isinstance(gate_up, Tensor) or not isinstance(down, Tensor) or reason or act is None:
        raise UserError(
            f"{kind} cannot be packed{f' ({reason})' if reason else ''}, expected gated FFNs without biases, "
            "gate_up_proj [E, 2I, H] and down_proj [E, H, I]"
        )
    return gate_up, down, act
