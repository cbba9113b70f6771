"""Configuration of an open-vocabulary detector."""

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

EDGE_BACKBONE = {"model_type": "timm_backbone", "backbone": "efficientvit_l1", "out_indices": [1, 2, 3]}
"""Levels at strides 8, 16 and 32, as in Grounding DINO 1.5 Edge."""


@strict
class DynamicDinoConfig(PreTrainedConfig):
    """What a :class:`~unimoe.detection.model.modeling.DynamicDinoForObjectDetection` is made of.

    The defaults are Grounding DINO 1.5 Edge (arXiv 2405.10300) as far as it was published; the depth of its
    enhancer was not.
    """

    model_type = "dynamic_dino"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone_config": AutoConfig, "text_config": AutoConfig}

    backbone_config: dict | PreTrainedConfig | None = None
    """An image backbone of transformers' ``AutoBackbone``, timm's among them (default: EfficientViT-L1)."""

    text_config: dict | PreTrainedConfig | None = None
    """A text encoder of BERT's kind (default: BERT-base)."""

    enhancer: Literal["edge", "full"] = "edge"
    """edge: text meets the coarsest level only, then the levels are fused. full: text meets all levels, which
    see one another by deformable attention (Grounding DINO, arXiv 2303.05499)."""

    num_feature_levels: int = 3
    """Levels of the pyramid; those beyond the backbone's are made by strided convolutions."""

    d_model: int = 256
    """Width of everything behind the two encoders, a multiple of 32."""

    num_heads: int = 8
    """Attention heads; fusion and the text layers of the enhancer have half as many."""

    ffn_dim: int = 2048
    """Inner width of the feed-forward networks; half of it in fusion and in the enhancer's text layers."""

    encoder_layers: int = 1
    """Layers of the enhancer."""

    decoder_layers: int = 6
    """Layers of the decoder."""

    num_points: int = 4
    """Sampling points per level and head of deformable attention."""

    num_queries: int = 900
    """Boxes per image (fewer where the image has fewer tokens)."""

    learned_queries: bool = True
    """Queries start from learned embeddings (Grounding DINO), or from the features of the image tokens they
    were selected by (RT-DETR), which say what is there from the first layer on."""

    csp_blocks: int = 3
    """edge: 3x3 convolutions in each block of the cross-scale fusion."""

    csp_expansion: float = 1.0
    """edge: their width over ``d_model``."""

    scaled_logits: bool = True
    """Class logit q.t/sqrt(d_model) + learned bias (MM-Grounding-DINO; needed to train from scratch), or the
    plain q.t of Grounding DINO."""

    share_box_head: bool = True
    """One box head for all decoder layers."""

    share_class_bias: bool = True
    """One class bias for all decoder layers."""

    activation_function: str = "relu"
    """Of the feed-forward networks."""

    dropout: float | int = 0.0
    """Of the enhancer and the decoder."""

    fusion_droppath: float | int = 0.0
    """Stochastic depth of the fusion."""

    layer_norm_eps: float = 1e-5

    positional_embedding_temperature: int = 20
    """Of the image's sine positions."""

    max_text_tokens: int = 256
    """Longest prompt."""

    text_sees_start: bool = True
    """Inside the text encoder each segment sees the prompt's first token as well, and its positions start
    behind it, as the encoder was trained. Without that, as in Grounding DINO, which trains its encoder along,
    MiniLM's features of "banana" and "tomato" have a cosine of 1.0000; with it 0.35."""

    image_size: int | list[int] = 640
    """Pixels: a square's side, or [shorter side, limit of the longer side]."""

    image_mean: list[float] | None = None
    """Per-channel mean on a 0..1 scale (default: ImageNet's)."""

    image_std: list[float] | None = None
    """Per-channel deviation on a 0..1 scale (default: ImageNet's)."""

    moe: dict[str, Any] | None = None
    """Fields of :class:`unimoe.moe.MoEConfig` for the decoder's FFNs; None keeps them dense. Each expert has
    the width ffn_dim / top_k, so that a token costs what the dense FFN does."""

    def __post_init__(self, **kwargs):
        self.backbone_config = _sub_config(self.backbone_config or EDGE_BACKBONE)
        self.text_config = _sub_config(self.text_config or {"model_type": "bert"})
        self.image_mean = self.image_mean or [0.485, 0.456, 0.406]
        self.image_std = self.image_std or [0.229, 0.224, 0.225]
        super().__post_init__(**kwargs)

    def validate_sizes(self):
        """Run by ``@strict`` at construction."""
        if self.d_model % 32 or self.d_model % self.num_heads or self.num_heads % 2:
            raise ValueError(
                f"d_model is {self.d_model} with {self.num_heads} heads, expected a multiple of 32 and of the"
                " heads, and an even number of heads"
            )


def _sub_config(config: dict | PreTrainedConfig) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    fields = dict(config)
    return CONFIG_MAPPING[fields.pop("model_type")](**fields)
