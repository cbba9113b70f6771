"""Loads a trained detector: a folder of ``unimoe fit``, or public Grounding DINO weights."""

from pathlib import Path

import torch
from transformers import AutoTokenizer

from unimoe.model.loading import ModelKind

from .build import Built
from .configuration import DynamicDinoConfig
from .grounding_dino import MODEL_TYPES, load_grounding_dino
from .modeling import DynamicDinoForObjectDetection

DETECTOR = ModelKind(
    DynamicDinoForObjectDetection,
    AutoTokenizer.from_pretrained,
    "a model folder of `unimoe fit` (config.json and weights)",
    (DynamicDinoConfig.model_type, *MODEL_TYPES),
)


def load_detector(model: str | Path, setting: str = "MODEL") -> Built:
    """The detector, in float32 and evaluation mode on the CPU, and its tokenizer.

    ``setting`` is its name in error messages.

    Raises:
        UserError: there is no detector, or its weights and its configuration do not have the same names and
            shapes.
    """
    source, model_type = DETECTOR.find(model, setting)
    if model_type in MODEL_TYPES:
        return load_grounding_dino(source)
    return DETECTOR.load(source, setting, torch.float32, device="cpu")
