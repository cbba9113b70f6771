"""Configuration of a multimodal mixture-of-experts model."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from unimoe.moe import MoEConfig

MODALITIES = ("text", "image", "video", "speech", "audio")
"""All modalities, in the order of their ids in :class:`unimoe.moe.Context` (text is 0)."""

MEDIA = MODALITIES[1:]
"""The modalities that come from an encoder."""

PLACEHOLDERS = {modality: f"<{modality}>" for modality in MEDIA}
"""The special token that stands for a media item of each modality in a prompt."""

MEDIA_INPUTS = {
    "image": ("pixel_values",),
    "video": ("video_pixels", "video_frames"),
    "speech": ("speech_features", "speech_frames"),
    "audio": ("audio_features", "audio_frames"),
}
"""Arguments of the model's ``forward`` that feed each encoder, in the order of the encoder's own. The first
axis of each counts the encoder's items: images, videos, audio windows."""

IGNORED = -100
"""The label of a position that is not learned."""


@strict
class UniMoeConfig(PreTrainedConfig):
    """What a :class:`~unimoe.model.modeling.UniMoeForConditionalGeneration` is made of."""

    model_type = "unimoe"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}  # type: ignore[override]  (a classproperty)

    text_config: dict | PreTrainedConfig | None = None
    """Configuration of the language model: any causal LM of transformers (default: a LLaMA)."""

    modalities: dict[str, Any] | None = None
    """One entry per modality (``image``, ``video``, ``speech``, ``audio``), with the configurations of its
    ``encoder`` (:func:`unimoe.encoders.build_encoder`) and its ``connector``
    (:func:`unimoe.encoders.build_connector`)."""

    moe: dict[str, Any] | None = None
    """Fields of :class:`unimoe.moe.MoEConfig`; None keeps the language model dense."""

    rope_sections: list[int] | None = None
    """Frequencies that rotate with time, height and width where ``position_ids`` are [3, B, T]
    (:mod:`unimoe.model.rope_3d`); together half a head, such as 16, 24, 24. None: a sequence."""

    rope_rate: float = 2.0
    """Advance of the time of video and audio per second, with ``rope_sections``."""

    image_token_id: int | None = None
    """Id of ``<image>``; None where the model has no images. The same for the three below."""

    video_token_id: int | None = None
    """Id of ``<video>``."""

    speech_token_id: int | None = None
    """Id of ``<speech>``."""

    audio_token_id: int | None = None
    """Id of ``<audio>`` (environmental sound)."""

    tie_word_embeddings: bool = False
    """Whether the head shares the input embedding; taken over from ``text_config`` where that says so."""

    def __post_init__(self, **kwargs):
        if self.text_config is None or isinstance(self.text_config, dict):
            fields = dict(self.text_config or {})
            self.text_config = CONFIG_MAPPING[fields.pop("model_type", "llama")](**fields)
        self.modalities = self.modalities or {}
        self.moe = MoEConfig.from_dict(self.moe).to_dict() if self.moe else None  # also those saved by 0.1
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings
        super().__post_init__(**kwargs)

    def validate_modalities(self):
        """Run by ``@strict`` at construction: each entry is a known modality, with encoder and connector."""
        for modality, parts in (self.modalities or {}).items():
            if modality not in MEDIA:
                known = ", ".join(MEDIA)
                raise ValueError(f"unknown modality '{modality}' in the configuration; known: {known}")
            if not isinstance(parts, dict) or not {"encoder", "connector"} <= parts.keys():
                raise ValueError(
                    f"modality '{modality}' needs the keys 'encoder' and 'connector', found {parts!r}"
                )

    def token_ids(self) -> dict[str, int]:
        """Placeholder id of every modality that this model takes."""
        return {modality: getattr(self, f"{modality}_token_id") for modality in self.modalities or {}}
