"""What ``unimoe compress stats``, ``prune`` and ``quantize`` need to run a detector on images.

unimoe compress stats runs/detector instances_train.json --output runs/stats
unimoe compress prune runs/detector --stats runs/stats --keep 3 --how frequency --output runs/pruned
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unimoe.data.read import spread
from unimoe.detection.data.batches import EvalBatch
from unimoe.detection.data.datamodule import eval_dataloader
from unimoe.detection.data.formats import read_detection
from unimoe.detection.evaluation.evaluator import detect_batch
from unimoe.detection.inference.detect import PromptChunks
from unimoe.detection.model.configuration import DynamicDinoConfig
from unimoe.detection.model.loading import load_detector
from unimoe.detection.model.modeling import DynamicDinoForObjectDetection
from unimoe.detection.model.prompt import class_prompts
from unimoe.detection.model.text_cache import TextFeatureCache
from unimoe.errors import UserError
from unimoe.model.loading import load_any, read_type


@dataclass
class DetectorBatch:
    """Images in which all names of their set are searched."""

    images: EvalBatch
    prompts: PromptChunks
    text: TextFeatureCache

    def run(self, model: DynamicDinoForObjectDetection) -> None:
        detect_batch(model, self.prompts, self.images.to(model.device), self.text, top=1)


@dataclass
class DetectorInputs:
    """Prepares a detector's inputs; takes the place of a processor."""

    model: DynamicDinoForObjectDetection
    tokenizer: Any

    def batches(
        self, file: str, samples: int, batch_size: int, images: str | None = None
    ) -> list[DetectorBatch]:
        """At most ``samples`` images of a file of boxes, evenly spaced.

        Raises:
            UserError: the file cannot be read, or has no list of classes.
        """
        data = read_detection(file, images)
        if not data.names:
            raise UserError(f"{file} has no list of classes, which a detector could be asked for")
        asked = [prompts[0] for prompts in class_prompts(data.names)]
        prompts = PromptChunks.of(asked, self.tokenizer, self.model.config.max_text_tokens)
        chosen = spread(range(len(data.samples)), samples)
        found = eval_dataloader(data, self.model, batch_size=batch_size, chosen=chosen)
        text = TextFeatureCache(self.model)
        return [DetectorBatch(batch, prompts, text) for batch in found]

    def save_pretrained(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)


def open_mixture(model: str, device: str | None = None) -> tuple[Any, Any]:
    """A mixture of experts and what prepares its inputs: a processor, or :class:`DetectorInputs`.

    Raises:
        UserError: there is neither, or :func:`unimoe.model.loading.load_any` cannot load it.
    """
    path = Path(model).expanduser()
    saved = (path / "config.json").is_file()
    if not saved or read_type(path, f"MODEL {path}", "a model") != DynamicDinoConfig.model_type:
        return load_any(model, device=device)
    detector, tokenizer = load_detector(model)
    detector.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
    return detector, DetectorInputs(detector, tokenizer)


def refuse_for_detector(processor: Any, flags: dict[str, bool]) -> None:
    """
    Raises:
        UserError: one of the flags was given, and the model is a detector.
    """
    given: Sequence[str] = [flag for flag, found in flags.items() if found]
    if given and isinstance(processor, DetectorInputs):
        raise UserError(f"{given[0]} is for language models; leave it out")
