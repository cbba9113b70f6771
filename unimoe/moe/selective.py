"""Self-attention whose heads choose their tokens (Union of Experts), for encoders and diffusion transformers.

A head sees later tokens before it chooses, so causal language models cannot use it (``ExpertsChoose``).

Shapes: B samples, S tokens of a sample, D hidden, H heads, d size of a head, C tokens that a head takes.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimoe.errors import UserError
from unimoe.moe.routers.experts_choose import ExpertsChoose

from . import records


class SelectiveAttention(nn.Module):
    """The heads of an attention as experts (UoE's SMHA, SMHA_v3.py of YujiaoYang-work/UoE).

    1. every head takes the tokens of each sample that score highest for it, k * n / H of n
    2. it attends among those only
    3. its output is added at their places: as it is (the released code, whose router then gets no gradient),
       or times the router's weight

    With k = H every head takes all tokens: exactly the dense attention. The projections are those of the
    dense layer, taken over by reference; positions must be in the tokens already.
    """

    def __init__(
        self,
        query: nn.Linear,
        key: nn.Linear,
        value: nn.Linear,
        output: nn.Linear,
        heads: int,
        k: int,
        combine: Literal["indicator", "weight"] = "indicator",
        layer_index: int = -1,
    ):
        """
        Args:
            query: [D, D], as all four.
            key: with as many heads as ``query``.
            value: likewise.
            output: from all heads to D.
            heads: H.
            k: heads that a token visits on average, 1..H.
            combine: factor of a head's output, 1 or the router's weight.
            layer_index: of the record.

        Raises:
            UserError: the projections cannot be divided into heads, or ``k`` is out of range.
        """
        super().__init__()
        hidden = query.in_features
        for layer in (query, key, value, output):
            if (layer.in_features, layer.out_features) != (hidden, hidden) or hidden % heads:
                found = f"{layer.in_features} -> {layer.out_features}"
                raise UserError(f"selective attention: {found} for {heads} heads of {hidden}")
        if combine not in ("indicator", "weight"):
            raise UserError(f"selective attention: combine is {combine!r}, expected indicator or weight")
        self.query, self.key, self.value, self.output = query, key, value, output
        self.heads, self.combine, self.layer_index = heads, combine, layer_index
        self.router = ExpertsChoose(hidden, heads, k)

    def forward(self, x_BSD: Tensor, pad_BS: Tensor | None = None) -> Tensor:
        """[B, S, D]; padding (True) is not attended to, and its own output is the bias alone."""
        B, S, D = x_BSD.shape
        sample_T = torch.arange(B, device=x_BSD.device).repeat_interleave(S)
        ctx = records.Context(pad_T=None if pad_BS is None else pad_BS.flatten(), sample_T=sample_T)
        routing = self.router(x_BSD.reshape(-1, D), ctx)
        with records.routing_context(ctx):
            records.append(self.layer_index, routing)
        chosen_BHS = routing.chosen().reshape(B, S, self.heads).transpose(1, 2)
        most = int(chosen_BHS.sum(-1).max())
        index_BHC = chosen_BHS.int().argsort(dim=-1, descending=True, stable=True)[..., :most]
        taken_BHC = chosen_BHS.gather(-1, index_BHC)
        x_BHCD = x_BSD[:, None].expand(-1, self.heads, -1, -1).gather(2, _wide(index_BHC, D))
        q, k, v = (self._project(layer, x_BHCD) for layer in (self.query, self.key, self.value))
        y_BHCd = F.scaled_dot_product_attention(q, k, v, attn_mask=taken_BHC[:, :, None])
        out_HDd = self.output.weight.unflatten(1, (self.heads, -1)).transpose(0, 1)
        y_BHCD = torch.einsum("bhcd,hDd->bhcD", y_BHCd, out_HDd) * taken_BHC[..., None]
        if self.combine == "weight":
            weight_BHS = routing.dense().reshape(B, S, self.heads).transpose(1, 2).to(y_BHCD.dtype)
            y_BHCD = y_BHCD * weight_BHS.gather(-1, index_BHC)[..., None]
        y_BSD = torch.zeros_like(x_BSD).scatter_add(
            1, _wide(index_BHC.flatten(1), D), y_BHCD.flatten(1, 2).to(x_BSD.dtype)
        )
        return y_BSD if self.output.bias is None else y_BSD + self.output.bias

    def _project(self, layer: nn.Linear, x_BHCD: Tensor) -> Tensor:
        """[B, H, C, d]: each head's own rows of a projection, on its own tokens."""
        y_BHCd = torch.einsum("bhcD,hdD->bhcd", x_BHCD, layer.weight.unflatten(0, (self.heads, -1)))
        return y_BHCd if layer.bias is None else y_BHCd + layer.bias.unflatten(0, (self.heads, 1, -1))


def _wide(index: Tensor, width: int) -> Tensor:
    """An index for gather and scatter of whole rows."""
    return index[..., None].expand(*index.shape, width)
