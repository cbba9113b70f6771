"""Connectors: from an encoder's features to tokens of the language model.

Shapes: B items, S encoder positions, D encoder width, N tokens, H language model width, P = pool x pool.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from unimoe.errors import UserError

from .encoder import parse_config


@dataclass
class ConnectorConfig:
    """Settings of all connectors; each type reads its own."""

    type: str = "mlp"
    """``linear``, ``mlp``, ``pooled_mlp`` or ``qformer``."""
    depth: int | None = None
    """Linear layers, GELU between them; None is 1 for linear and pooled_mlp, 2 for mlp (LLaVA's
    mlp2x_gelu)."""
    hidden_size: int | None = None
    """Width between the linear layers, and of the Q-Former; None is the language model's width, for the
    Q-Former 768."""
    pool: int | None = None
    """pooled_mlp on images: the token grid is pooled to pool x pool; None is 2 unless stack is set."""
    pooling: Literal["mean", "max"] = "mean"
    """pooled_mlp on images: how a cell of the grid is pooled; max keeps small objects."""
    stack: int | None = None
    """pooled_mlp on speech: so many consecutive positions side by side make one token (5 is usual)."""
    grid: list[int] | None = None
    """pooled_mlp on images: height and width of the token grid; None takes a square."""
    time: Literal["keep", "mean"] | None = None
    """Treatment of a video's frames, which each go through a connector of this type: ``keep`` puts the
    frames' tokens one after another, with a learned position for each frame; ``mean`` takes their mean, as
    Uni-MoE does."""
    frames: int | None = None
    """Frames of a video, at most; taken from the encoder when a model is built."""
    frame_positions: int | None = None
    """Encoder positions of a video's frame; taken from the encoder when a model is built."""
    num_queries: int = 32
    """qformer: tokens per item."""
    num_layers: int = 4
    """qformer: layers."""
    num_heads: int = 12
    """qformer: attention heads."""
    cross_every: int = 1
    """qformer: insert cross-attention every N layers, from the first; 1 is all (BLIP-2 has 2)."""
    dropout: float = 0.0
    """qformer: dropout in training."""
    causal: bool = False
    """qformer: a query attends to itself and those before it, as Whisper's decoder does in Uni-MoE."""

    @classmethod
    def parse(cls, config: dict[str, Any]) -> "ConnectorConfig":
        """Read the configuration from a dictionary.

        Raises:
            UserError: a type or key is unknown, or values contradict each other.
        """
        kind = config.get("type")
        if kind not in _DEPTHS:
            raise UserError(f"unknown connector type {kind!r}; known: {', '.join(_DEPTHS)}")
        parsed = parse_config(cls, config)
        parsed.type = kind
        for name in (
            "depth",
            "hidden_size",
            "pool",
            "stack",
            "num_queries",
            "num_layers",
            "num_heads",
            "cross_every",
            "frames",
            "frame_positions",
        ):
            value = getattr(parsed, name)
            if value is not None and value < 1:
                raise UserError(f"connector {kind}: {name} is {value}, expected at least 1")
        if kind == "linear" and parsed.depth not in (None, 1):
            raise UserError(
                f"connector linear: depth is {parsed.depth}; use type mlp for more than one layer"
            )
        if parsed.pooling not in ("mean", "max"):
            raise UserError(f"connector {kind}: pooling is {parsed.pooling!r}, expected mean or max")
        if parsed.time not in (None, "keep", "mean"):
            raise UserError(f"connector {kind}: time is {parsed.time!r}, expected keep or mean")
        if parsed.time and not (parsed.frames and parsed.frame_positions):
            raise UserError(f"connector {kind}: time needs frames and frame_positions, those of the encoder")
        if parsed.pool and parsed.stack:
            raise UserError(
                "connector pooled_mlp: found both pool (images) and stack (speech), expected one of them"
            )
        if kind != "pooled_mlp" and (parsed.pool or parsed.stack):
            raise UserError(f"connector {kind}: pool and stack belong to type pooled_mlp")
        parsed.depth = parsed.depth or _DEPTHS[kind]
        if kind == "pooled_mlp" and not parsed.stack:
            parsed.pool = parsed.pool or 2
        return parsed

    def num_tokens(self, positions: int) -> int:
        """N for an item of so many encoder positions."""
        if self.time:
            frames = positions // (self.frame_positions or 1)
            per_frame = replace(self, time=None).num_tokens(self.frame_positions or 1)
            return per_frame * (frames if self.time == "keep" else 1)
        if self.type == "qformer":
            return self.num_queries
        if self.stack:
            return -(-positions // self.stack)
        return self.pool**2 if self.pool else positions


_DEPTHS = {"linear": 1, "mlp": 2, "pooled_mlp": 1, "qformer": 1}


class Connector(nn.Module):
    """``forward(features_BSD, lengths_B | None) -> (tokens_BNH, counts_B)``.

    ``lengths_B`` counts the real positions of each item (None: all); ``counts_B`` (int64) the real tokens,
    which come first. Tokens beyond an item's count are to be ignored. An item's tokens do not depend on the
    rest of its batch.
    """

    def __init__(self, config: ConnectorConfig):
        super().__init__()
        self.config = config

    def num_tokens(self, positions: int) -> int:
        """The tokens of an item of so many encoder positions."""
        return self.config.num_tokens(positions)

    def counts(self, features_BSD: Tensor, lengths_B: Tensor | None) -> Tensor:
        """``counts_B`` for features of these lengths."""
        lengths = [features_BSD.shape[1]] * len(features_BSD) if lengths_B is None else lengths_B.tolist()
        return torch.tensor([self.num_tokens(length) for length in lengths], device=features_BSD.device)


class MLPConnector(Connector):
    """Types linear, mlp and pooled_mlp (LLaVA-1.5's projector, 2310.03744, with pooling before it).

    1. ``gather``: one input row per token: a position, a cell of the grid (its mean or maximum), or ``stack``
       positions side by side with zeros beyond the item's length;
    2. ``layers``: Linear, or Linear-GELU-Linear and so on.
    """

    def __init__(self, config: ConnectorConfig, in_features: int, out_features: int):
        super().__init__(config)
        width = config.hidden_size or out_features
        depth = config.depth or 1
        sizes = [in_features * (config.stack or 1), *[width] * (depth - 1), out_features]
        layers: list[nn.Module] = []
        for size, following in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(size, following), nn.GELU()]
        self.layers = nn.Sequential(*layers[:-1])

    @property
    def last(self) -> nn.Linear:
        """The last linear layer."""
        layer = self.layers[-1]
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, features_BSD: Tensor, lengths_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        dtype = next(self.layers.parameters()).dtype  # also where adapters took the place of layers
        tokens_BNH = self.layers(self.gather(features_BSD, lengths_B).to(dtype))
        return tokens_BNH, self.counts(features_BSD, lengths_B)

    def gather(self, features_BSD: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """The input rows of the first layer, ``[B, N, D or stack * D]``."""
        if self.config.stack:
            return self._stack(features_BSD, self.config.stack, lengths_B)
        if self.config.pool:
            return self._pool(features_BSD, self.config.pool)
        return features_BSD

    def _pool(self, x_BSD: Tensor, pool: int) -> Tensor:
        positions = x_BSD.shape[1]
        height, width = self.config.grid or [math.isqrt(positions)] * 2
        if height * width != positions:
            raise UserError(
                f"pooled_mlp: {positions} positions are no {height} x {width} grid; set the connector's grid"
            )
        x_BDHW = x_BSD.transpose(1, 2).unflatten(2, (height, width))
        reduce = nnf.adaptive_max_pool2d if self.config.pooling == "max" else nnf.adaptive_avg_pool2d
        return reduce(x_BDHW, pool).flatten(2).transpose(1, 2)

    @staticmethod
    def _stack(x_BSD: Tensor, stack: int, lengths_B: Tensor | None) -> Tensor:
        positions = x_BSD.shape[1]
        if lengths_B is not None:
            inside_BS = torch.arange(positions, device=x_BSD.device) < lengths_B.to(x_BSD.device)[:, None]
            x_BSD = torch.where(inside_BS[..., None], x_BSD, 0)
        x_BSD = nnf.pad(x_BSD, (0, 0, 0, -positions % stack))
        return x_BSD.unflatten(1, (-1, stack)).flatten(2)


def num_tokens(config: dict[str, Any], positions: int) -> int:
    """The tokens that a connector of this ``config`` makes of so many encoder positions; builds nothing."""
    return ConnectorConfig.parse(config).num_tokens(positions)
