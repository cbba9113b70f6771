"""Modules whose weights are packed: experts, linear layers and embeddings of 1, 2, 3, 4 or 8 bits a weight.

They compute with the packed weights as they lie (:mod:`unimoe.kernels.packed`), save them as buffers, and can
be built on the meta device. Nothing in them trains, but gradients pass through to what is below.

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
from unimoe.moe.experts.base import Experts
from unimoe.moe.experts.swiglu import SwiGLUExperts

from .routing import Routing, sort_by_expert

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
            codes: those of gate_up_proj [E, 2I, H] and down_proj [E, H, I], where they were quantised
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
                    stack.fill(e, *kernel.quantise_rtn(weights[e], one, group))
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

    def forward(self, x_TD: Tensor, routing: Routing | Tensor, weight: Tensor) -> Tensor:
        """[T, D] -> [T, D].

        ``routing`` and ``weight`` [N] are those of :class:`Experts`; or, as transformers' blocks call theirs,
        experts [T, K] and weights [T, K]. Experts >= E add nothing.
        """
        if isinstance(routing, Routing):
            token_N, offsets_E1, weight_N = routing.token_N, routing.offsets_E1, weight
        else:
            slot_N, token_N, _, offsets_E1 = sort_by_expert(routing, self.num_experts)
            weight_N = weight.reshape(-1).index_select(0, slot_N)
        return kernel.fused_experts(
            x_TD, token_N, offsets_E1, weight_N, *self.stacks(), self.bits, self.act, self.level
        )

    def dequantised(self, e: int) -> tuple[Tensor, Tensor]:
        """gate_up [2I, H] and down [H, I] of one expert in float32."""
        gate_up, down = self.stacks()
        return gate_up.dequantise(e, self.level), down.dequantise(e, self.level)

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


class PackedLinear(nn.Module):
    """A linear layer with packed weights.

    Args:
        in_features: K.
        out_features: O.
        bits: of a weight.
        group: neighbouring weights of a row that share a scale; divides K.
        bias: whether there is a bias, which stays as it is.

    Raises:
        UserError: the group does not divide K, or there are no such bits.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, in_features: int, out_features: int, bits: int, group: int = 64, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features, self.bits, self.group = in_features, out_features, bits, group
        stack = kernel.Stack.empty([bits], out_features, in_features, group)
        self.register_buffer("codes", stack.codes)
        self.register_buffer("scales", stack.scales)
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls, linear: nn.Module, bits: int, group: int = 64, codes: Codes | None = None
    ) -> "PackedLinear":
        """Pack an ``nn.Linear``.

        Args:
            linear: what has ``weight`` [O, K] and perhaps ``bias`` [O].
            bits: of a weight.
            group: neighbouring weights of a row that share a scale.
            codes: where the weight was quantised elsewhere; None rounds to nearest.

        Raises:
            UserError: bits or a group that cannot be packed.
        """
        weight: Any = linear.weight
        bias: Any = getattr(linear, "bias", None)
        with torch.device(weight.device):
            self = cls(weight.shape[1], weight.shape[0], bits, group, bias is not None)
        self.bias = bias
        if not weight.is_meta:
            self.stack().fill(0, *(codes or kernel.quantise_rtn(weight, bits, group)))
        return self

    def stack(self) -> kernel.Stack:
        """Of one matrix: what is in this module's buffers."""
        buffers: dict[str, Any] = self._buffers
        sizes = ((self.bits,), self.out_features, self.in_features, self.group)
        return kernel.Stack(buffers["codes"], buffers["scales"], *sizes)

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() or input.dtype is not torch.float32 or not kernel.runs_native(input):
            return kernel.linear(input, self.stack(), self.bias)
        # the same without what Python takes for it, which is as much as the product of a small layer
        buffers = self._buffers
        sizes = (self.out_features, self.bits, False, 0, self._parameters["bias"])
        return torch.ops.unimoe.packed_linear.default(input, buffers["codes"], buffers["scales"], *sizes)

    @property
    def weight(self) -> Tensor:
        """[O, K] in float32, unpacked anew each time."""
        return self.stack().dequantise(0)

    @property
    def num_weights(self) -> int:
        """Weights that are packed here."""
        return self.in_features * self.out_features

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bits={self.bits}, group={self.group}, bias={self.bias is not None}"


class PackedEmbedding(nn.Module):
    """An embedding that reads its rows out of a packed head, to which it is tied.

    The head holds the weights, so they are saved once.

    Args:
        head: [V, D] weights.
        dtype: of the embeddings.
    """

    def __init__(self, head: PackedLinear, dtype: torch.dtype = torch.float32):
        super().__init__()
        self._head = (head,)  # in a tuple, so that it is no submodule
        self.num_embeddings, self.embedding_dim = head.out_features, head.in_features
        # says the model's dtype, which a cast of the model changes
        self.register_buffer("like", torch.empty(0, dtype=dtype, device="cpu"), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """[...] ids -> [..., D]"""
        rows = self._head[0].stack().take(0, input.reshape(-1))
        return rows.unflatten(0, input.shape).to(self.like.dtype)

    @property
    def weight(self) -> Tensor:
        """[V, D] in float32, unpacked anew each time."""
        return self._head[0].weight

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, tied to a packed head"


def packed_weights(module: nn.Module) -> int:
    """Number of weights that are packed in a module, which ``parameters()`` does not name."""
    return sum(one.num_weights for one in module.modules() if isinstance(one, PackedExperts | PackedLinear))


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
    odd = [
        flag
        for flag, wanted in (
            ("has_bias", False),
            ("is_transposed", False),
            ("has_post_expert_norm", False),
            ("has_gate", True),
            ("is_concatenated", True),
        )
        if getattr(experts, flag, wanted) is not wanted
    ]
    if not isinstance(gate_up, Tensor) or not isinstance(down, Tensor) or odd or act is None:
        reason = f" ({odd[0]} is {getattr(experts, odd[0])})" if odd else ""
        raise UserError(
            f"{kind} cannot be packed{reason}, expected gated FFNs without biases, gate_up_proj [E, 2I, H] "
            "and down_proj [E, H, I]"
        )
    return gate_up, down, act
