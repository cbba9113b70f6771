"""The Q-Former: learned queries that read an encoder's features into a fixed number of tokens.

Shapes: B items, S encoder positions, D encoder width, Q queries, W inner width, H model width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from unimoe.errors import UserError

from .connector import Connector, ConnectorConfig


class QFormerConnector(Connector):
    """Pre-norm stack of self-attention, cross-attention and MLP over learned queries.

    After BLIP-2 (Li et al., 2301.12597, section 3.1) and Uni-MoE (2405.11273). Differences from Uni-MoE's
    code: queries start as N(0, 0.02) instead of zeros, which leave all queries equal; cross-attention is
    masked to the real length. With ``causal`` and the weights of ``load_whisper_decoder`` it is
    Whisper's decoder, which Uni-MoE reads speech with.

    1. the queries, the same for every item;
    2. per layer ``x += self(norm x)``, in every ``cross_every``-th ``x += cross(norm x, features)``,
       ``x += mlp(norm x)``;
    3. norm and one linear layer to the language model's width.
    """

    def __init__(self, config: ConnectorConfig, in_features: int, out_features: int):
        super().__init__(config)
        width = config.hidden_size or 768
        if width % config.num_heads:
            raise UserError(
                f"connector qformer: hidden_size {width} is not divisible by num_heads {config.num_heads}"
            )
        self.queries = nn.Parameter(torch.empty(config.num_queries, width).normal_(std=0.02))
        self.layers = nn.ModuleList(
            QFormerLayer(width, in_features if index % config.cross_every == 0 else None, config)
            for index in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, out_features)

    def forward(self, features_BSD: Tensor, lengths_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        features_BSD = features_BSD.to(self.queries.dtype)
        mask_B11S = None
        if lengths_B is not None:
            positions = torch.arange(features_BSD.shape[1], device=features_BSD.device)
            mask_B11S = (positions < lengths_B.to(positions.device)[:, None])[:, None, None]
        x_BQW = self.queries.expand(len(features_BSD), -1, -1)
        for layer in self.layers:
            x_BQW = layer(x_BQW, features_BSD, mask_B11S)
        return self.proj(self.norm(x_BQW)), self.counts(features_BSD, lengths_B)


class QFormerLayer(nn.Module):
    """One pre-norm layer; ``in_features`` None leaves the cross-attention out."""

    def __init__(self, width: int, in_features: int | None, config: ConnectorConfig):
        super().__init__()
        self.self_norm = nn.LayerNorm(width)
        self.self_attention = Attention(width, width, config.num_heads)
        self.cross_norm = nn.LayerNorm(width) if in_features else None
        self.cross_attention = Attention(width, in_features, config.num_heads) if in_features else None
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.causal = config.causal

    def forward(self, x_BQW: Tensor, features_BSD: Tensor, mask_B11S: Tensor | None) -> Tensor:
        normed_BQW = self.self_norm(x_BQW)
        x_BQW = x_BQW + self.dropout(self.self_attention(normed_BQW, normed_BQW, causal=self.causal))
        if self.cross_attention is not None and self.cross_norm is not None:
            x_BQW = x_BQW + self.dropout(
                self.cross_attention(self.cross_norm(x_BQW), features_BSD, mask_B11S)
            )
        return x_BQW + self.dropout(self.mlp(x_BQW))


class Attention(nn.Module):
    """Multi-head attention of ``width`` over keys and values of ``source_width``."""

    def __init__(self, width: int, source_width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x_BQW: Tensor, source_BSD: Tensor, mask_B11S: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        query, key, value = (
            projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projected in (self.query(x_BQW), self.key(source_BSD), self.value(source_BSD))
        )
        y_BNQd = nnf.scaled_dot_product_attention(query, key, value, attn_mask=mask_B11S, is_causal=causal)
        return self.out(y_BNQd.transpose(1, 2).flatten(2))
