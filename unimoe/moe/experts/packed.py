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
from .packed_stacks import Codes, PackedStacks, Sizes
from .swiglu import SwiGLUExperts

ACTS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}
"""Names of activations by their classes in torch and transformers."""


class PackedExperts(PackedStacks):
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
        check_gate(act)
        super().__init__(num_experts, hidden_size, intermediate_size, bits, group, act, nested)
        self.level = 0
        """Bits of each code that count; 0 for all."""
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
        self.fill((gate_up, down), codes)
        return self

    def sizes(self) -> tuple[Sizes, Sizes]:
        H, inner = self.hidden_size, self.intermediate_size
        return Sizes("gate_up", 2 * inner, H, halves=2), Sizes("down", H, inner)

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

    def active_parameters(self, visits: float) -> float:
        return visits * self.num_weights / self.num_experts


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
