"""Configuration of an open-vocabulary detector."""

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from unimoe.moe import MoEConfig

EDGE_BACKBONE = {"model_type": "timm_backbone", "backbone": "efficientvit_l1", "out_indices": [1, 2, 3]}
"""Levels at strides 8, 16 and 32, as in Grounding DINO 1.5 Edge."""


@strict
class DynamicDinoConfig(PreTrainedConfig):
    """Architecture of a :class:`~unimoe.detection.model.modeling.DynamicDinoForObjectDetection`.

    The defaults are those of Grounding DINO 1.5 Edge (arXiv 2405.10300); the depth of its enhancer is not
    published.
    """

    model_type = "dynamic_dino"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone_config": AutoConfig, "text_config": AutoConfig}  # type: ignore[override]  (a classproperty)

    backbone_config: dict | PreTrainedConfig | None = None
    """An image backbone for ``AutoBackbone`` of transformers, including timm models (default:
    EfficientViT-L1)."""

    text_config: dict | PreTrainedConfig | None = None
    """A BERT-like text encoder (default: BERT-base)."""

    enhancer: Literal["edge", "full"] = "edge"
    """edge: text is fused with the coarsest level only, then the levels are fused. full: text is fused with
    all levels, which use deformable attention (Grounding DINO, arXiv 2303.05499)."""

    num_feature_levels: int = 3
    """Feature levels; strided convolutions add those that the backbone does not have."""

    d_model: int = 256
    """Hidden size after the two encoders, a multiple of 32."""

    num_heads: int = 8
    """Attention heads; half as many in the fusion and text layers of the enhancer."""

    ffn_dim: int = 2048
    """Inner width of the FFNs; half of it in the fusion and text layers of the enhancer."""

    encoder_layers: int = 1
    """Layers of the enhancer."""

    decoder_layers: int = 6
    """Layers of the decoder."""

    num_points: int = 4
    """Sampling points per level and head of deformable attention."""

    num_queries: int = 900
    """Predicted boxes per image (fewer if the image has fewer tokens)."""

    learned_queries: bool = True
    """Queries start from learned embeddings (Grounding DINO), or from the features of the image tokens they
    they were selected from (RT-DETR), which describe the content from the first layer on."""

    csp_blocks: int = 3
    """edge: 3x3 convolutions in each block of the cross-scale fusion."""

    csp_expansion: float = 1.0
    """edge: width of these convolutions, as a multiple of ``d_model``."""

    scaled_logits: bool = True
    """Class logits q.t/sqrt(d_model) + a learned bias (MM-Grounding-DINO; needed for training from scratch)
    instead of the plain q.t of Grounding DINO."""

    share_box_head: bool = True
    """One box head for all decoder layers."""

    share_class_bias: bool = True
    """One class bias for all decoder layers."""

    activation_function: str = "relu"
    """Activation function of the FFNs."""

    dropout: float | int = 0.0
    """Dropout in the enhancer and the decoder."""

    fusion_droppath: float | int = 0.0
    """Stochastic depth of the fusion layers."""

    layer_norm_eps: float = 1e-5

    positional_embedding_temperature: int = 20
    """Temperature of the sine position embeddings of the image."""

    max_text_tokens: int = 256
    """Maximum prompt length in tokens."""

    text_sees_start: bool = True
    """Whether, in the text encoder, each segment also attends to the first token of the prompt, and its
    positions start after that token, as in the encoder's pretraining. Grounding DINO does without, but trains
    its encoder: with a frozen MiniLM, "banana" and "tomato" then have features of cosine similarity 1.0000,
    else 0.35."""

    image_size: int | list[int] = 640
    """Size in pixels: side of a square, or [shorter side, limit of the longer side]."""

    image_mean: list[float] | None = None
    """Per-channel mean on a 0..1 scale (default: ImageNet's)."""

    image_std: list[float] | None = None
    """Per-channel standard deviation on a 0..1 scale (default: ImageNet's)."""

    moe: dict[str, Any] | None = None
    """Fields of :class:`unimoe.moe.MoEConfig` for the FFNs of the decoder; None keeps them dense. Each expert
    has the width ffn_dim / slices, so a query that visits ``slices`` experts costs as much as before."""

    def __post_init__(self, **kwargs):
        self.backbone_config = _sub_config(self.backbone_config or EDGE_BACKBONE)
        self.text_config = _sub_config(self.text_config or {"model_type": "bert"})
        self.image_mean = self.image_mean or [0.485, 0.456, 0.406]
        self.image_std = self.image_std or [0.229, 0.224, 0.225]
        if self.moe:
            if "num_experts" in self.moe:  # 0.1, whose experts had the width ffn_dim / top_k
                self.moe = {**self.moe, "slices": self.moe.get("top_k", 2)}
            self.moe = MoEConfig.from_dict({"experts": "ffn", **self.moe}).to_dict()
        super().__post_init__(**kwargs)

    def validate_sizes(self):
        """Called by ``@strict`` after construction.

        Raises:
            ValueError: the sizes do not fit together.
        """
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
