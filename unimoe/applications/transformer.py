"""Parts of small transformers on images.

Shapes: B images, C channels, S side, N tokens, P values of a patch, D width, F size of the time's embedding.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCIES = 256


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


def attend(qkv_BNE: Tensor, heads: int, mask_NN: Tensor | None = None) -> Tensor:
    """Attention among the tokens of an image: [B, N, 3D] queries, keys and values -> [B, N, D].

    Args:
        qkv_BNE: projected tokens.
        heads: of attention.
        mask_NN: bool, True where a token (row) sees another (column); by default all see all.
    """
    q, k, v = qkv_BNE.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, d]
    return F.scaled_dot_product_attention(q, k, v, mask_NN).transpose(1, 2).flatten(2)


def to_patches(x_BCSS: Tensor, patch: int) -> Tensor:
    """[B, N, P] squares of ``patch`` x ``patch``, row by row."""
    side = x_BCSS.shape[-1] // patch
    x_BNP = x_BCSS.unflatten(3, (side, -1)).unflatten(2, (side, -1)).permute(0, 2, 4, 1, 3, 5)
    return x_BNP.flatten(3).flatten(1, 2)


def from_patches(x_BNP: Tensor, patch: int) -> Tensor:
    """The images [B, C, S, S] of :func:`to_patches`."""
    side = math.isqrt(x_BNP.shape[1])
    x = x_BNP.unflatten(2, (-1, patch, patch)).unflatten(1, (side, side))
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def grid_places(side: int, width: int) -> Tensor:
    """[side^2, D] fixed positions: sines and cosines of the row in one half, of the column in the other."""
    rates = 10_000 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * rates
    one = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, D/2]
    rows, columns = one[:, None].expand(-1, side, -1), one[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def frequencies(time_B: Tensor) -> Tensor:
    """[B, F] cosines and sines of 1000 t, as DiT embeds its timesteps."""
    rates = torch.exp(
        -math.log(10_000) * torch.arange(FREQUENCIES // 2, device=time_B.device) / (FREQUENCIES // 2)
    )
    angles = 1000 * time_B[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)
