"""Parts of small transformers on images.

Shapes: B images, N tokens, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FFN(nn.Module):
    """Linear, GELU, linear. GELU is exact, as in the FFN experts; DiT's own has the tanh approximation."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.up_proj, self.act_fn, self.down_proj = (
            nn.Linear(width, inner),
            nn.GELU(),
            nn.Linear(inner, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)))


def attend(qkv_BNE: Tensor, heads: int) -> Tensor:
    """Attention among all tokens of an image: [B, N, 3D] queries, keys and values -> [B, N, D]."""
    q, k, v = qkv_BNE.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, d]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def grid_places(side: int, width: int) -> Tensor:
    """[side^2, D] fixed positions: sines and cosines of the row in one half, of the column in the other."""
    rates = 10_000 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * rates
    one = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, D/2]
    rows, columns = one[:, None].expand(-1, side, -1), one[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)
