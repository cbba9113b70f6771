"""A finished detector: a folder of ``unimoe fit``, or public Grounding DINO weights, here or on the hub."""

from pathlib import Path

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
    """The detector, in evaluation mode on the CPU, and its tokenizer.

    ``setting`` is what errors call it. Raises UserError when there is no detector, or when its weights and
    its configuration do not have the same names and shapes.
    """
    source, model_type = DETECTOR.find(model, setting)
    if model_type in MODEL_TYPES:
        return load_grounding_dino(source)
    return DETECTOR.load(source, setting, device="cpu")
