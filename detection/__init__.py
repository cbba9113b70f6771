"""Open-vocabulary detection: Dynamic-DINO, its dense base, and what trains and measures them."""

from transformers import AutoConfig, AutoModelForZeroShotObjectDetection

from unimoe.detection.model.configuration import DynamicDinoConfig
from unimoe.detection.model.modeling import DynamicDinoForObjectDetection
from unimoe.detection.model.output import DynamicDinoOutput, Target
from unimoe.detection.model.prompt import Prompt, PromptBatch, chunk_names

AutoConfig.register("dynamic_dino", DynamicDinoConfig, exist_ok=True)
AutoModelForZeroShotObjectDetection.register(DynamicDinoConfig, DynamicDinoForObjectDetection, exist_ok=True)

__all__ = [
    "DynamicDinoConfig",
    "DynamicDinoForObjectDetection",
    "DynamicDinoOutput",
    "Prompt",
    "PromptBatch",
    "Target",
    "chunk_names",
]
