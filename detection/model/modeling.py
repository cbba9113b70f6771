"""The detector: finds the objects in an image that a text prompt names.

Shapes: B images, H x W pixels, L text tokens, Q queries, D = d_model, T = all decoder queries (denoising
queries first).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoBackbone, AutoModel
from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoPreTrainedModel

from unimoe.encoders.weights import own_weights
from unimoe.moe import Context, LayerRecord, auxiliary_loss, record, routing_context
from unimoe.moe.install import moe_layers
from unimoe.moe.losses.auxiliary import alone
from unimoe.training.ranks import across_ranks

from .configuration import DynamicDinoConfig
from .decoder import Decoder
from .denoising import DenoisingQueries
from .enhancer import EdgeEnhancer, FullEnhancer
from .output import DynamicDinoOutput
from .pyramid import Pyramid, Text
from .selection import Proposals, QuerySelection

ENHANCERS = {"edge": EdgeEnhancer, "full": FullEnhancer}


class DynamicDinoPreTrainedModel(GroundingDinoPreTrainedModel):
    """Base class for transformers; modules of transformers are initialised by its own class."""

    config: DynamicDinoConfig  # type: ignore[override]  (no GroundingDinoConfig)
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    _supports_sdpa = True

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, with weights that are independent of the files (:func:`own_weights`)."""
        loaded = super().from_pretrained(*args, **kwargs)
        own_weights(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False):
        """Initialise modules without parameters of their own as well: transformers skips these in models that
        it does not know, which would leave box heads and deformable attention with default linear layers."""
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            return
        super()._init_weights(module)
        reset = getattr(module, "reset_parameters", None)
        if callable(reset) and type(module).__module__.startswith("unimoe."):
            reset()


class DynamicDinoForObjectDetection(DynamicDinoPreTrainedModel):
    """Grounding DINO, Grounding DINO 1.5 Edge and Dynamic-DINO (arXiv 2507.17436), by configuration.

    The forward pass:

    1. backbone and text encoder compute features, which are projected to ``d_model``
    2. the enhancer fuses image and text features by cross-attention
    3. query selection chooses image tokens and predicts a box for each
    4. the decoder refines the boxes and predicts a logit for each text token
    """

    def __init__(self, config: DynamicDinoConfig):
        super().__init__(config)
        self.backbone = AutoBackbone.from_config(config.backbone_config)
        self.text_encoder = AutoModel.from_config(config.text_config)
        self.text_encoder.pooler = None  # unused: its weights would never get a gradient
        self.image_projections = _projections(self.backbone.channels, config)
        self.text_projection = nn.Linear(self.text_encoder.config.hidden_size, config.d_model)
        self.enhancer = ENHANCERS[config.enhancer](config)
        self.selection = QuerySelection(config)
        self.query_embedding = (
            nn.Embedding(config.num_queries, config.d_model) if config.learned_queries else None
        )
        self.decoder = Decoder(config)
        self.post_init()

    def train(self, mode: bool = True):
        """Encoders without trainable weights stay in evaluation mode (no dropout), and the batch norms of the
        backbone keep their running statistics, since batches are small."""
        super().train(mode)
        for part in (self.backbone, self.text_encoder):
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def freeze_encoders(self) -> None:
        """Freeze backbone and text encoder, so that their outputs can be cached."""
        self.backbone.requires_grad_(False)
        self.text_encoder.requires_grad_(False)
        self.train(self.training)

    def encode_image(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Feature maps of the backbone [B, C, h, w], fine to coarse; padded pixels are set to 0 first."""
        if pixel_mask is not None:
            pixel_values = pixel_values * pixel_mask[:, None].to(pixel_values.dtype)
        return tuple(self.backbone(pixel_values).feature_maps)

    def encode_text(
        self, input_ids: Tensor, text_attention_mask: Tensor, text_position_ids: Tensor
    ) -> Tensor:
        """Features of the text encoder [B, L, its width]; those of a name do not depend on other names."""
        if self.config.text_sees_start:
            first_L = torch.arange(input_ids.shape[1], device=input_ids.device) == 0
            text_attention_mask = text_attention_mask | first_L
            text_position_ids = torch.where(first_L, 0, text_position_ids + 1)
        table = getattr(getattr(self.text_encoder, "embeddings", None), "position_embeddings", None)
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            text_position_ids = text_position_ids + table.padding_idx + 1  # RoBERTa counts from there
        return self.text_encoder(
            input_ids=input_ids, attention_mask=text_attention_mask[:, None], position_ids=text_position_ids
        ).last_hidden_state

    def forward(
        self,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
        text_attention_mask: Tensor | None = None,
        text_position_ids: Tensor | None = None,
        image_features: Sequence[Tensor] | None = None,
        text_features: Tensor | None = None,
        denoising: DenoisingQueries | None = None,
    ) -> DynamicDinoOutput:
        """Run the detector; :class:`~unimoe.detection.model.prompt.PromptBatch` makes the text arguments.

        Args:
            pixel_values: [B, 3, H, W], normalised by the configuration's mean and std.
            pixel_mask: [B, H, W], 1 on the image, 0 on its padding at the right and below (None: no padding).
            input_ids: [B, L].
            text_mask: [B, L] bool, True on real tokens.
            text_attention_mask: [B, L, L] bool, True inside a segment.
            text_position_ids: [B, L], position within the segment.
            image_features: cached outputs of ``encode_image``; ``pixel_values`` is then not needed.
            text_features: cached outputs of ``encode_text``; ``input_ids`` is then not needed.
            denoising: extra queries of a training step; the other queries do not see them.

        Raises:
            ValueError: an input is missing.
        """
        if text_mask is None or text_attention_mask is None or text_position_ids is None:
            raise ValueError(
                "text_mask, text_attention_mask and text_position_ids are needed, see PromptBatch.inputs()"
            )
        if image_features is None:
            if pixel_values is None:
                raise ValueError("give pixel_values or image_features")
            image_features = self.encode_image(pixel_values, pixel_mask)
        if text_features is None:
            if input_ids is None:
                raise ValueError("give input_ids or text_features")
            text_features = self.encode_text(input_ids, text_attention_mask, text_position_ids)

        pyramid = Pyramid.of(self.project(image_features), pixel_mask)
        text_BLD = self.text_projection(text_features)
        text = Text(text_BLD, text_mask.bool(), text_attention_mask.bool(), text_position_ids)
        pyramid, text = self.enhancer(pyramid, text)
        proposals = self.selection(pyramid, text)

        logits, boxes, references, records = self.decode(pyramid, text, proposals, denoising)
        extra = 0 if denoising is None else denoising.boxes_BD4.shape[1]
        return DynamicDinoOutput(
            logits=logits[:, :, extra:],
            boxes=boxes[:, :, extra:],
            encoder_logits=proposals.logits_BQL,
            encoder_boxes=proposals.boxes_BQ4,
            references=references[:, :, extra:],
            text_mask=text.mask_BL,
            denoising_logits=logits[:, :, :extra] if extra else None,
            denoising_boxes=boxes[:, :, :extra] if extra else None,
            aux_loss=self.aux_loss(records),
        )

    def decode(
        self, pyramid: Pyramid, text: Text, proposals: Proposals, denoising: DenoisingQueries | None
    ) -> tuple[Tensor, Tensor, Tensor, list[LayerRecord]]:
        """The decoder's outputs over all T queries, and the routing of its MoE layers."""
        references_BT4, self_mask = proposals.boxes_BQ4.detach(), None
        batch, queries = references_BT4.shape[:2]
        if self.query_embedding is None:
            x_BTD = proposals.tokens_BQD.detach()
        else:
            x_BTD = self.query_embedding.weight[:queries].expand(batch, -1, -1)
        pad_BT = torch.zeros(batch, queries, dtype=torch.bool, device=x_BTD.device)
        if denoising is not None:
            x_BTD = torch.cat([denoising.tokens_BDL.to(x_BTD.dtype) @ text.features_BLD, x_BTD], dim=1)
            references_BT4 = torch.cat([denoising.boxes_BD4.to(references_BT4.dtype), references_BT4], dim=1)
            self_mask = denoising.visible(queries)
            pad_BT = F.pad(pad_BT, (x_BTD.shape[1] - queries, 0), value=True)  # not in the expert load
        sample_T = torch.arange(batch, device=x_BTD.device).repeat_interleave(x_BTD.shape[1])
        with record() as records, routing_context(Context(pad_BT.flatten(), sample_T=sample_T)):
            return *self.decoder(x_BTD, references_BT4, pyramid, text, self_mask), records

    def project(self, image_features: Sequence[Tensor]) -> list[Tensor]:
        """Feature maps of width ``d_model``; levels beyond those of the backbone are computed from the level
        before."""
        maps = []
        for level, projection in enumerate(self.image_projections):
            last_or_own = image_features[min(level, len(image_features) - 1)]
            maps.append(projection(maps[-1] if level > len(image_features) else last_or_own))
        return maps

    def aux_loss(self, records: list[LayerRecord]) -> Tensor:
        """The configured auxiliary losses, summed over the recorded MoE layers (0-d; 0 for a dense model)."""
        if not records or not self.config.moe:
            return torch.zeros((), device=self.device)
        # over all ranks; in evaluation they do not run in step
        across = across_ranks if self.training else alone
        return auxiliary_loss(self.config.moe["losses"], records, moe_layers(self), across)


def _projections(channels: Sequence[int], config: DynamicDinoConfig) -> nn.ModuleList:
    """1x1 convolutions for the levels of the backbone, 3x3 with stride 2 for further levels."""
    widths = list(channels)
    if len(widths) > config.num_feature_levels:
        raise ValueError(
            f"the backbone gives {len(widths)} levels, expected at most num_feature_levels = "
            f"{config.num_feature_levels}; change backbone_config.out_indices"
        )
    convs = [nn.Conv2d(width, config.d_model, 1) for width in widths]
    width = widths[-1]
    while len(convs) < config.num_feature_levels:
        convs.append(nn.Conv2d(width, config.d_model, 3, stride=2, padding=1))
        width = config.d_model
    return nn.ModuleList(nn.Sequential(conv, nn.GroupNorm(32, config.d_model)) for conv in convs)
