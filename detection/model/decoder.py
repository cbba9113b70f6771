"""The decoder: queries attend to one another, to the text and to the image, and refine their boxes.

Shapes: B images, Q queries, S image tokens, N levels, L text tokens, D = d_model.
"""

import torch
from torch import Tensor, nn
from transformers.models.grounding_dino.modeling_grounding_dino import (
    GroundingDinoMultiscaleDeformableAttention,
)

from unimoe.errors import UserError
from unimoe.moe import FFNExperts, MoEConfig, MoELayer, build_router
from unimoe.moe.install import layer_options

from .configuration import DynamicDinoConfig
from .enhancer import library_config
from .layers import FFN, MLP, Attention, BoxHead, ContrastiveHead, sine_position
from .pyramid import Pyramid, Text

LOGIT_EPS = 1e-5
"""Reference boxes are clamped to this distance from 0 and 1 before the logit."""


def feed_forward(config: DynamicDinoConfig, layer: int) -> FFN | MoELayer:
    """The dense FFN of a layer, or an MoE layer of experts as wide as one of its slices.

    Raises:
        UserError: ``moe.experts.slices`` does not divide ``ffn_dim``.
    """
    moe = MoEConfig.from_dict(config.moe) if config.moe else None
    placed = moe.layers(config.decoder_layers) if moe else []
    if moe is None or layer not in placed:
        return FFN(config)
    slices = moe.experts["slices"]
    if config.ffn_dim % slices:
        raise UserError(f"moe.experts.slices is {slices}, expected a divisor of ffn_dim ({config.ffn_dim})")
    experts = FFNExperts(
        moe.num_experts, config.d_model, config.ffn_dim // slices, act=config.activation_function
    )
    router = build_router(config.d_model, moe, placed.index(layer), len(placed))
    options = layer_options(moe, moe.place(config.d_model))
    return MoELayer(router, experts, combine=moe.combine, layer_index=layer, **options)


class DecoderLayer(nn.Module):
    """Post-norm layer: self-attention of the queries, cross-attention to the text, deformable attention to
    the image around the boxes, then the FFN.

    ``ffn`` is a dense :class:`FFN`, or after MoE-Tuning an :class:`unimoe.moe.MoELayer`.
    """

    def __init__(self, config: DynamicDinoConfig, index: int):
        super().__init__()
        self.self_attn, self.text_attn = Attention(config), Attention(config)
        self.image_attn = GroundingDinoMultiscaleDeformableAttention(
            library_config(config), config.num_heads, config.num_points
        )
        self.ffn = feed_forward(config, index)
        self.self_attn_norm, self.text_attn_norm, self.image_attn_norm, self.ffn_norm = (
            nn.LayerNorm(config.d_model, config.layer_norm_eps) for _ in range(4)
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_BQD: Tensor,
        position_BQD: Tensor,
        references_BQN4: Tensor,
        pyramid: Pyramid,
        text: Text,
        self_mask: Tensor | None,
    ) -> Tensor:
        placed_BQD = x_BQD + position_BQD
        x_BQD = self.self_attn_norm(
            x_BQD + self.dropout(self.self_attn(placed_BQD, placed_BQD, x_BQD, self_mask))
        )
        from_text_BQD = self.text_attn(
            x_BQD + position_BQD, text.features_BLD, text.features_BLD, text.mask_BL[:, None, None]
        )
        x_BQD = self.text_attn_norm(x_BQD + self.dropout(from_text_BQD))
        from_image_BQD, _ = self.image_attn(
            hidden_states=x_BQD,
            attention_mask=pyramid.mask_BS,
            encoder_hidden_states=pyramid.tokens_BSD,
            position_embeddings=position_BQD,
            reference_points=references_BQN4,
            spatial_shapes=pyramid.shapes_N2,
            spatial_shapes_list=pyramid.shapes,
        )
        x_BQD = self.image_attn_norm(x_BQD + self.dropout(from_image_BQD))
        return self.ffn_norm(x_BQD + self.dropout(self.ffn(x_BQD)))


class Decoder(nn.Module):
    """Iterative refinement (Deformable DETR, arXiv 2010.04159, appendix A.4).

    For each layer:

    1. the position embedding of a query is computed from its current box
    2. the layer runs; class logits and box are predicted from its normalised output
    3. the next layer starts from the refined box, detached from the graph
    """

    def __init__(self, config: DynamicDinoConfig):
        super().__init__()
        width = config.d_model
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.decoder_layers))
        self.norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.position_head = MLP(2 * width, width, width, depth=2)
        box_heads = 1 if config.share_box_head else config.decoder_layers
        class_heads = 1 if config.share_class_bias else config.decoder_layers
        self.box_heads = nn.ModuleList(BoxHead(config) for _ in range(box_heads))
        self.class_heads = nn.ModuleList(ContrastiveHead(config) for _ in range(class_heads))

    def forward(
        self,
        x_BQD: Tensor,
        references_BQ4: Tensor,
        pyramid: Pyramid,
        text: Text,
        self_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [layers, B, Q, L], boxes [layers, B, Q, 4], the boxes that each layer started from).

        ``self_mask``: bool, True where a query may attend, broadcastable to [B, heads, Q, Q].
        """
        ratios_BN4 = pyramid.valid_ratios_BN2.repeat(1, 1, 2)
        logits, boxes, references = [], [], []
        for index, layer in enumerate(self.layers):
            box_head = self.box_heads[index % len(self.box_heads)]
            class_head = self.class_heads[index % len(self.class_heads)]
            references_BQN4 = references_BQ4[:, :, None] * ratios_BN4[:, None]
            position_BQD = self.position_head(sine_position(references_BQN4[:, :, 0], x_BQD.shape[-1] // 2))
            x_BQD = layer(x_BQD, position_BQD, references_BQN4, pyramid, text, self_mask)

            out_BQD = self.norm(x_BQD)
            start_BQ4 = references_BQ4.logit(eps=LOGIT_EPS)
            logits.append(class_head(out_BQD, text.features_BLD, text.mask_BL))
            boxes.append((box_head(out_BQD).to(start_BQ4.dtype) + start_BQ4).sigmoid())
            references.append(references_BQ4)
            if index + 1 < len(self.layers):
                # from the output before its norm, as in the released models
                step_BQ4 = box_head(x_BQD.detach()).to(start_BQ4.dtype)
                references_BQ4 = (step_BQ4 + start_BQ4).sigmoid().detach()
        return torch.stack(logits), torch.stack(boxes), torch.stack(references)
