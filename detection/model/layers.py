"""Building blocks of enhancer, query selection and decoder.

Shapes: B images, Q queries, S keys (image or text tokens), L text tokens, D = d_model, I inner width, P
coordinates.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .configuration import DynamicDinoConfig

CLASS_PRIOR = 0.01
"""Probability of every class at the start of training (focal loss, Lin et al., section 3.3)."""


class Attention(nn.Module):
    """Multi-head attention: ``query [B, Q, D]``, ``key`` and ``value [B, S, D] -> [B, Q, D]``."""

    def __init__(self, config: DynamicDinoConfig):
        super().__init__()
        width = config.d_model
        self.num_heads, self.dropout = config.num_heads, float(config.dropout)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """``mask``: bool, True where a query may attend, broadcastable to [B, heads, Q, S]."""
        q, k, v = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x in (self.query(query), self.key(key), self.value(value))
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class FFN(nn.Module):
    """down(act(up(x))), with biases: ``[..., D] -> [..., D]``."""

    def __init__(self, config: DynamicDinoConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.d_model, config.ffn_dim)
        self.down_proj = nn.Linear(config.ffn_dim, config.d_model)
        self.act_fn = ACT2FN[config.activation_function]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.dropout(self.act_fn(self.up_proj(x))))


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, width_in: int, width: int, width_out: int, depth: int):
        super().__init__()
        widths = [width_in, *[width] * (depth - 1), width_out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:  # type: ignore[union-attr]
            x = F.relu(layer(x))
        return self.layers[-1](x)


class BoxHead(MLP):
    """[..., D] -> [..., 4]: offset from a reference box, in logits of (cx, cy, w, h); initialised to zero."""

    def __init__(self, config: DynamicDinoConfig):
        super().__init__(config.d_model, config.d_model, 4, depth=3)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.layers[-1].bias)  # type: ignore[arg-type]


class ContrastiveHead(nn.Module):
    """Class logits [B, Q, L] of queries [B, Q, D] against text tokens [B, L, D], -inf on padding.

    The dot product of Grounding DINO, or scaled and with a learned bias as in MM-Grounding-DINO (arXiv
    2401.02361): from scratch, the plain dot product starts at a loss of several hundred.
    """

    def __init__(self, config: DynamicDinoConfig):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(())) if config.scaled_logits else None
        self.scale = config.d_model**-0.5 if config.scaled_logits else 1.0

    def reset_parameters(self) -> None:
        if self.bias is not None:
            nn.init.constant_(self.bias, -math.log((1 - CLASS_PRIOR) / CLASS_PRIOR))

    def forward(self, query_BQD: Tensor, text_BLD: Tensor, text_mask_BL: Tensor) -> Tensor:
        logits_BQL = query_BQD @ (text_BLD * self.scale).transpose(1, 2)
        if self.bias is not None:
            logits_BQL = logits_BQL + self.bias
        return logits_BQL.masked_fill(~text_mask_BL[:, None], -math.inf)


def sine_position(position: Tensor, width: int) -> Tensor:
    """Sines and cosines of each coordinate, interleaved: ``[..., P] -> [..., P * width]``.

    For a box (x, y, ...) y comes first, as in the code of DAB-DETR.
    """
    power = 2 * (torch.arange(width, device=position.device) // 2) / width
    angle = position[..., None].float() * (2 * math.pi / 10000**power)
    waves = torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2)
    if waves.shape[-2] > 1:
        waves = torch.cat([waves[..., 1:2, :], waves[..., :1, :], waves[..., 2:, :]], dim=-2)
    return waves.flatten(-2).to(position.dtype)
