"""Linear layers and embeddings whose weights are packed, as those of :mod:`unimoe.moe.experts.packed`.

Shapes: O outputs, K inputs, G groups of a row, V vocabulary, D hidden.
"""

from typing import Any

import torch
from torch import Tensor, nn

from unimoe.kernels import packed as kernel
from unimoe.moe.experts.packed_stacks import Codes, PackedStacks


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
    bias: nn.Parameter | None

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
            codes: where the weight was quantized elsewhere; None rounds to nearest.

        Raises:
            UserError: bits or a group that cannot be packed.
        """
        weight: Any = linear.weight
        bias: Any = getattr(linear, "bias", None)
        with torch.device(weight.device):
            self = cls(weight.shape[1], weight.shape[0], bits, group, bias is not None)
        self.bias = bias
        if not weight.is_meta:
            self.stack().fill(0, *(codes or kernel.quantize_rtn(weight, bits, group)))
        return self

    def stack(self) -> kernel.Stack:
        """Stack of one matrix: what is in this module's buffers."""
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
        return self.stack().dequantize(0)

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

    like: Tensor

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
    kinds = (PackedStacks, PackedLinear)
    return sum(one.num_weights for one in module.modules() if isinstance(one, kinds))
