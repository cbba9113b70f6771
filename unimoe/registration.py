"""Making our classes known to transformers."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration import UniMoeConfig
from .modeling import UniMoeForConditionalGeneration, UniMoeModel
from .processing import UniMoeProcessor


def register() -> None:
    """Register the model with the Auto classes. Safe to call twice."""
    AutoConfig.register("unimoe", UniMoeConfig, exist_ok=True)
    AutoModel.register(UniMoeConfig, UniMoeModel, exist_ok=True)
    AutoModelForImageTextToText.register(UniMoeConfig, UniMoeForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(UniMoeConfig, UniMoeForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(UniMoeConfig, UniMoeProcessor, exist_ok=True)
