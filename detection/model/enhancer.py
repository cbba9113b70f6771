"""Feature enhancers: cross-attention between image and text before boxes are proposed.

Shapes: B images, S cells (P5: of the coarsest level), D = d_model, L text tokens, H x W cells of a level.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GroundingDinoConfig
from transformers.models.grounding_dino.modeling_grounding_dino import (
    GroundingDinoEncoder,
    GroundingDinoEncoderLayer,
    GroundingDinoFusionLayer,
    GroundingDinoSinePositionEmbedding,
    GroundingDinoTextEnhancerLayer,
)

from .configuration import DynamicDinoConfig
from .layers import FFN, Attention, sine_position
from .pyramid import Pyramid, Text


def library_config(config: DynamicDinoConfig) -> GroundingDinoConfig:
    """``config`` as the configuration of the Grounding DINO modules of transformers."""
    return GroundingDinoConfig(
        d_model=config.d_model,
        encoder_ffn_dim=config.ffn_dim,
        encoder_attention_heads=config.num_heads,
        encoder_n_points=config.num_points,
        num_feature_levels=config.num_feature_levels,
        activation_function=config.activation_function,
        dropout=config.dropout,
        fusion_droppath=config.fusion_droppath,
        positional_embedding_temperature=config.positional_embedding_temperature,
        layer_norm_eps=config.layer_norm_eps,
    )


class Enhancer(nn.Module):
    """``forward(pyramid, text) -> (pyramid, text)``."""

    def __init__(self, config: DynamicDinoConfig):
        super().__init__()
        self.image_position = GroundingDinoSinePositionEmbedding(library_config(config))

    def positions(self, mask_BHW: Tensor) -> Tensor:
        """Sine position embeddings of the cells of a level, [B, H*W, D]."""
        return self.image_position(mask_BHW, mask_BHW).flatten(2).transpose(1, 2)

    def forward(self, pyramid: Pyramid, text: Text) -> tuple[Pyramid, Text]:
        raise TypeError(f"{type(self).__name__} must define forward(pyramid, text)")


def text_positions(text: Text) -> Tensor:
    """[B, L, D] sine embeddings of the positions within the segments."""
    positions_BL1 = text.position_ids_BL[..., None].to(text.features_BLD.dtype)
    return sine_position(positions_BL1, text.features_BLD.shape[-1])


class EdgeLayer(nn.Module):
    """One layer over text and the coarsest level of the image.

    1. bi-directional cross-attention with one shared score matrix (transformers' fusion layer)
    2. self-attention of the text, within its segments
    3. global self-attention of the image, then an FFN (post-norm)
    """

    def __init__(self, config: DynamicDinoConfig):
        super().__init__()
        self.fusion_layer = GroundingDinoFusionLayer(library_config(config))
        self.text_enhancer_layer = GroundingDinoTextEnhancerLayer(library_config(config))
        self.self_attn, self.ffn = Attention(config), FFN(config)
        self.self_attn_norm = nn.LayerNorm(config.d_model, config.layer_norm_eps)
        self.ffn_norm = nn.LayerNorm(config.d_model, config.layer_norm_eps)

    def forward(
        self, image_BSD: Tensor, mask_BS: Tensor, position_BSD: Tensor, text_BLD: Tensor, text: Text
    ) -> tuple[Tensor, Tensor]:
        (image_BSD, _), (text_BLD, _) = self.fusion_layer(image_BSD, text_BLD, ~mask_BS, ~text.mask_BL)
        text_BLD, _ = self.text_enhancer_layer(text_BLD, text.attention_mask_BLL, text_positions(text))
        where = image_BSD + position_BSD
        image_BSD = self.self_attn_norm(
            image_BSD + self.self_attn(where, where, image_BSD, mask_BS[:, None, None])
        )
        return self.ffn_norm(image_BSD + self.ffn(image_BSD)), text_BLD


class EdgeEnhancer(Enhancer):
    """Grounding DINO 1.5 Edge (arXiv 2405.10300, section 2.2): ``encoder_layers`` layers on the coarsest
    level, from which the cross-scale fusion carries the text's influence to the finer ones."""

    def __init__(self, config: DynamicDinoConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(EdgeLayer(config) for _ in range(config.encoder_layers))
        self.cross_scale = CrossScaleFusion(config)

    def forward(self, pyramid: Pyramid, text: Text) -> tuple[Pyramid, Text]:
        maps, mask_BHW = pyramid.maps(), pyramid.masks()[-1]
        image_BSD, text_BLD = maps[-1].flatten(2).transpose(1, 2), text.features_BLD
        position_BSD = self.positions(mask_BHW).to(image_BSD.dtype)
        for layer in self.layers:
            image_BSD, text_BLD = layer(image_BSD, mask_BHW.flatten(1), position_BSD, text_BLD, text)
        maps[-1] = image_BSD.transpose(1, 2).unflatten(2, pyramid.shapes[-1])
        return pyramid.with_maps(self.cross_scale(maps)), _with_features(text, text_BLD)


class FullEnhancer(Enhancer):
    """The enhancer of Grounding DINO: each layer fuses the text with all levels and applies deformable
    attention to them (layers of transformers)."""

    def __init__(self, config: DynamicDinoConfig):
        super().__init__(config)
        library = library_config(config)
        self.layers = nn.ModuleList(GroundingDinoEncoderLayer(library) for _ in range(config.encoder_layers))
        self.level_embed = nn.Parameter(torch.empty(config.num_feature_levels, config.d_model))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.level_embed)

    def forward(self, pyramid: Pyramid, text: Text) -> tuple[Pyramid, Text]:
        image_BSD, text_BLD = pyramid.tokens_BSD, text.features_BLD
        positions = [
            self.positions(mask) + e for mask, e in zip(pyramid.masks(), self.level_embed, strict=True)
        ]
        shapes_N2 = pyramid.shapes_N2
        references = GroundingDinoEncoder.get_reference_points(
            pyramid.shapes, pyramid.valid_ratios_BN2, device=image_BSD.device
        )
        for layer in self.layers:
            (image_BSD, text_BLD), _ = layer(
                vision_features=image_BSD,
                vision_position_embedding=torch.cat(positions, dim=1).to(image_BSD.dtype),
                spatial_shapes=shapes_N2,
                spatial_shapes_list=pyramid.shapes,
                level_start_index=shapes_N2.prod(1).cumsum(0) - shapes_N2.prod(1),
                key_padding_mask=~pyramid.mask_BS,
                reference_points=references,
                text_features=text_BLD,
                text_attention_mask=~text.mask_BL,
                text_self_attention_masks=~text.attention_mask_BLL,
                text_position_embedding=text_positions(text),
            )
        return pyramid.with_tokens(image_BSD), _with_features(text, text_BLD)


class CrossScaleFusion(nn.Module):
    """Cross-scale fusion of RT-DETR (Zhao et al., arXiv 2304.08069, section 4.2): takes and returns maps
    [B, D, H, W], fine to coarse.

    1. top-down: each level is fused with the next coarser one, upsampled by nearest neighbour
    2. bottom-up: each level is fused with the next finer one, downsampled by a strided convolution

    Group norm replaces the batch norm of RT-DETR, so the outputs do not depend on the number of processes or
    on training mode.
    """

    def __init__(self, config: DynamicDinoConfig):
        super().__init__()
        width, steps = config.d_model, config.num_feature_levels - 1
        self.lateral = nn.ModuleList(ConvNorm(width, width, 1) for _ in range(steps))
        self.top_down = nn.ModuleList(CSPBlock(config) for _ in range(steps))
        self.down = nn.ModuleList(ConvNorm(width, width, 3, stride=2) for _ in range(steps))
        self.bottom_up = nn.ModuleList(CSPBlock(config) for _ in range(steps))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        inner = [maps[-1]]
        for finer, lateral, block in zip(maps[-2::-1], self.lateral, self.top_down, strict=True):
            inner[0] = lateral(inner[0])
            widened = F.interpolate(inner[0], size=finer.shape[2:], mode="nearest")
            inner.insert(0, block(torch.cat([widened, finer], dim=1)))
        out = [inner[0]]
        for coarser, down, block in zip(inner[1:], self.down, self.bottom_up, strict=True):
            out.append(block(torch.cat([down(out[-1]), coarser], dim=1)))
        return out


class ConvNorm(nn.Sequential):
    """Convolution, group norm, SiLU."""

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int = 1):
        super().__init__(
            nn.Conv2d(width_in, width_out, kernel, stride, padding=kernel // 2, bias=False),
            nn.GroupNorm(math.gcd(32, width_out), width_out),
            nn.SiLU(),
        )


class CSPBlock(nn.Module):
    """Cross-stage-partial block, 2D -> D channels: the sum of two narrow branches, one of which has 3x3
    convolutions."""

    def __init__(self, config: DynamicDinoConfig):
        super().__init__()
        width = config.d_model
        inner = int(width * config.csp_expansion)
        self.branch = nn.Sequential(
            ConvNorm(2 * width, inner, 1), *(ConvNorm(inner, inner, 3) for _ in range(config.csp_blocks))
        )
        self.shortcut = ConvNorm(2 * width, inner, 1)
        self.out = nn.Identity() if inner == width else ConvNorm(inner, width, 1)

    def forward(self, maps: Tensor) -> Tensor:
        return self.out(self.branch(maps) + self.shortcut(maps))


def _with_features(text: Text, features_BLD: Tensor) -> Text:
    return Text(features_BLD, text.mask_BL, text.attention_mask_BLL, text.position_ids_BL)
