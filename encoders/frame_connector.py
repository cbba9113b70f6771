"""Connector of a video's frames, whose tokens keep, or do not keep, their time.

Shapes: B videos, F frames of the longest, N frames of all videos, S positions of a frame, D encoder width,
T tokens of a frame, H language model width.
"""

import torch
from torch import Tensor, nn

from unimoe.errors import UserError

from .connector import Connector, ConnectorConfig


class FrameConnector(Connector):
    """Any image connector over the frames of a video.

    1. every frame becomes the T tokens that ``frame``, the connector of the configured type, makes of it;
    2. ``keep``: frame f's tokens get the learned temporal position f, and all stand one after another: F * T;
       ``mean``: token t is the mean of the frames' t-th tokens, as in Uni-MoE (2405.11273, section 3.1; 576
       tokens for 8 frames of CLIP ViT-L/14-336), which cannot tell a video from its reverse.
    """

    def __init__(self, config: ConnectorConfig, frame: Connector, out_features: int):
        super().__init__(config)
        self.frame = frame
        frames = (config.frames or 0) if config.time == "keep" else 0
        self.positions = nn.Parameter(torch.empty(frames, out_features).normal_(std=0.02)) if frames else None

    def forward(self, features_BSD: Tensor, lengths_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        per_frame = self.config.frame_positions or 1
        x_BFSD = features_BSD.unflatten(1, (-1, per_frame))
        rows, most = x_BFSD.shape[:2]
        frames_B = torch.full((rows,), most) if lengths_B is None else lengths_B // per_frame
        inside_BF = torch.arange(most, device=x_BFSD.device) < frames_B.to(x_BFSD.device)[:, None]
        tokens_NTH, _ = self.frame(x_BFSD[inside_BF])
        if self.positions is not None:
            if most > len(self.positions):
                places = len(self.positions)
                raise UserError(f"a video of {most} frames, but the connector has {places} positions")
            tokens_NTH = tokens_NTH + self.positions[:most].expand(rows, -1, -1)[inside_BF][:, None]
        tokens_BFTH = tokens_NTH.new_zeros(rows, most, *tokens_NTH.shape[1:])
        tokens_BFTH[inside_BF] = tokens_NTH
        counts_B = self.counts(features_BSD, lengths_B)
        if self.config.time == "mean":
            return tokens_BFTH.sum(1) / inside_BF.sum(1)[:, None, None], counts_B
        return tokens_BFTH.flatten(1, 2), counts_B
