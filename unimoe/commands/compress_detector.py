"""What ``unimoe compress`` needs to run a detector on images.

unimoe compress stats runs/detector instances_train.json --output runs/stats
unimoe compress prune runs/detector --stats runs/stats --keep 3 --how frequency --output runs/pruned
unimoe compress report runs/detector runs/pruned --data instances_val.json --output runs/report
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unimoe.compress.measure import Precision, resident_bytes
from unimoe.compress.report import Figures
from unimoe.data.read import spread
from unimoe.detection.data.annotations import DetectionSet
from unimoe.detection.data.batches import EvalBatch
from unimoe.detection.data.datamodule import eval_dataloader
from unimoe.detection.data.formats import read_detection
from unimoe.detection.evaluation.evaluator import DetectionEvaluator, detect_batch
from unimoe.detection.evaluation.latency import time_in_turns
from unimoe.detection.inference.detect import PromptChunks
from unimoe.detection.model.configuration import DynamicDinoConfig
from unimoe.detection.model.loading import load_detector
from unimoe.detection.model.modeling import DynamicDinoForObjectDetection
from unimoe.detection.model.prompt import class_prompts
from unimoe.detection.model.text_cache import TextFeatureCache
from unimoe.errors import UserError
from unimoe.model.loading import load_any, read_type
from unimoe.moe.view import expert_counts


@dataclass
class DetectorBatch:
    """Images in which all names of their set are searched."""

    images: EvalBatch
    prompts: PromptChunks
    text: TextFeatureCache

    @property
    def passes(self) -> int:
        """Forward passes of the decoder over the images, one for each prompt."""
        return len(self.prompts.chunks)

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
        data = read_boxes(file, images)
        asked = [prompts[0] for prompts in class_prompts(data.names)]
        prompts = PromptChunks.of(asked, self.tokenizer, self.model.config.max_text_tokens)
        chosen = spread(range(len(data.samples)), samples)
        found = eval_dataloader(data, self.model, batch_size=batch_size, chosen=chosen)
        text = TextFeatureCache(self.model)
        return [DetectorBatch(batch, prompts, text) for batch in found]

    def score(self, data: DetectionSet, samples: int | None, batch_size: int) -> tuple[dict[str, float], int]:
        """COCO's metrics over at most ``samples`` images of a set, evenly spaced (None: all), and how many
        those are.

        Raises:
            UserError: an image cannot be read, or none of them has boxes.
        """
        chosen = spread(range(len(data.samples)), samples or len(data.samples))
        evaluator = DetectionEvaluator(self.model, self.tokenizer, data)
        for batch in eval_dataloader(data, self.model, batch_size=batch_size, chosen=chosen):
            evaluator.update(batch.to(self.model.device))
        metrics = evaluator.compute(searched=True).metrics
        if metrics["AP"] < 0:
            raise UserError(f"{data.path}: none of the {len(chosen)} images has boxes; give more --samples")
        return metrics, evaluator.images

    def milliseconds_per_image(self, data: DetectionSet, steps: int) -> float:
        """Milliseconds of the first image of a set: the 20th percentile of ``steps``, with the text's
        features cached. On a machine with other work compare only figures of one call."""
        batch, *_ = eval_dataloader(data, self.model, batch_size=1, chosen=[0])
        batch, evaluator = batch.to(self.model.device), DetectionEvaluator(self.model, self.tokenizer, data)
        seconds = time_in_turns({"image": lambda: evaluator.update(batch)}, steps)["image"]
        return 1000 * sorted(seconds)[steps // 5]

    def save_pretrained(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)


def read_boxes(file: str, images: str | None) -> DetectionSet:
    """A file of boxes.

    Raises:
        UserError: it cannot be read, or has no list of classes.
    """
    data = read_detection(file, images)
    if not data.names:
        raise UserError(f"{file} has no list of classes, which a detector could be asked for")
    return data


def is_detector(model: str, setting: str = "MODEL") -> bool:
    """Whether a folder holds a detector; ``setting`` is what an error calls it.

    Raises:
        UserError: its configuration cannot be read.
    """
    path = Path(model).expanduser()
    saved = (path / "config.json").is_file()
    return saved and read_type(path, f"{setting} {path}", "a model") == DynamicDinoConfig.model_type


def open_mixture(model: str, device: str | None = None) -> tuple[Any, Any]:
    """A mixture of experts and what prepares its inputs: a processor, or :class:`DetectorInputs`.

    Raises:
        UserError: there is neither, or :func:`unimoe.model.loading.load_any` cannot load it.
    """
    if not is_detector(model):
        return load_any(model, device=device)
    return _load(model, device)


def _load(
    model: str, device: str | None = None, setting: str = "MODEL"
) -> tuple[DynamicDinoForObjectDetection, DetectorInputs]:
    detector, tokenizer = load_detector(model, setting)
    detector.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
    return detector, DetectorInputs(detector, tokenizer)


def detector_figures(
    folders: Sequence[str],
    files: dict[str, str],
    samples: int | None,
    batch_size: int,
    images: str | None,
    steps: int,
) -> Iterator[Figures]:
    """Figures of detectors, the original first, for ``unimoe compress report``.

    Args:
        folders: of the detectors.
        files: of boxes, by name of the domain.
        samples: most images of each file, evenly spaced; None for all.
        batch_size: images of a batch.
        images: folder of the images (default: that of each file).
        steps: how often an image is timed.

    Raises:
        UserError: a folder holds no detector, a file cannot be read, or has no boxes to score.
    """
    for folder in folders[1:]:
        if not is_detector(folder, "CHANGED"):
            raise UserError(f"CHANGED {folder} is no detector, expected one, as MODEL is")
    sets = {name: read_boxes(file, images) for name, file in files.items()}
    for data in sets.values():
        if not data.annotated or not data.boxes:
            raise UserError(f"{data.path} has no boxes to score detectors by")
        data.check_sizes()
    original: dict[str, float] = {}
    for folder in folders:
        model, inputs = _load(folder, setting="CHANGED" if original else "MODEL")
        found = {name: inputs.score(data, samples, batch_size) for name, data in sets.items()}
        original = original or {name: metrics["AP"] for name, (metrics, _) in found.items()}
        yield Figures(
            str(folder),
            list(expert_counts(model).values()),
            resident_bytes(model),
            inputs.milliseconds_per_image(next(iter(sets.values())), steps),
            {
                name: Precision(metrics["AP"], original[name] - metrics["AP"], metrics["AP50"], count)
                for name, (metrics, count) in found.items()
            },
        )
        del model, inputs  # before the next is loaded


def refuse_for_detector(processor: Any, flags: dict[str, bool]) -> None:
    """
    Raises:
        UserError: one of the flags was given, and the model is a detector.
    """
    given: Sequence[str] = [flag for flag, found in flags.items() if found]
    if given and isinstance(processor, DetectorInputs):
        raise UserError(f"{given[0]} is for language models; leave it out")
