"""Open-vocabulary detection: Dynamic-DINO, its dense base, and what trains and measures them."""

from transformers import AutoConfig, AutoModelForZeroShotObjectDetection

from .configuration import DynamicDinoConfig
from .modeling import DynamicDinoForObjectDetection
from .output import DynamicDinoOutput, Target
from .prompt import Prompt, PromptBatch, chunk_names

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
