"""The model's classes, made known to the Auto classes; imported when one of them is first asked for."""

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

__all__ = ["UniMoeConfig", "UniMoeForConditionalGeneration", "UniMoeModel", "UniMoeProcessor"]

AutoConfig.register("unimoe", UniMoeConfig, exist_ok=True)
AutoModel.register(UniMoeConfig, UniMoeModel, exist_ok=True)
AutoModelForImageTextToText.register(UniMoeConfig, UniMoeForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(UniMoeConfig, UniMoeForConditionalGeneration, exist_ok=True)
AutoProcessor.register(UniMoeConfig, UniMoeProcessor, exist_ok=True)
