"""Parts of small transformers on images.

Shapes: B images, C channels, S side, N tokens, P values of a patch, D width, F size of the time's embedding.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimoe.errors import UserError

FREQUENCIES = 256


def check_sizes(where: str, config: Any, *names: str, multiple: int = 1) -> None:
    """Check the settings of a transformer.

    Args:
        where: prefix of the settings' flags, such as ``model.dit``.
        config: holds the settings; ``width`` and ``heads`` among them.
        names: of numbers that are to be at least 1.
        multiple: of which the width is to be one.

    Raises:
        UserError: a number is below 1, or the width is no multiple of the heads and of ``multiple``.
    """
    for name in names:
        if getattr(config, name) < 1:
            raise UserError(f"{where}.{name} is {getattr(config, name)}, expected at least 1")
    for divisor, name in ((config.heads, f"{where}.heads, "), (multiple, "")):
        if config.width % divisor:
            raise UserError(f"{where}.width is {config.width}, expected a multiple of {name}{divisor}")


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


class Block(nn.Module):
    """Attention and FFN, each behind a norm and beside a residual connection."""

    def __init__(self, width: int, heads: int, make_ffn: Callable[[], nn.Module], qkv_bias: bool = True):
        """
        Args:
            width: of a token.
            heads: of attention.
            make_ffn: returns the FFN, [B, N, D] -> [B, N, D]; is called last, so that its random weights
                follow those of attention.
            qkv_bias: whether queries, keys and values have biases.
        """
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=qkv_bias), nn.Linear(width, width)
        self.ffn = make_ffn()

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.out(attend(self.qkv(self.norm1(x_BND)), self.heads))
        return x_BND + self.ffn(self.norm2(x_BND))


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
