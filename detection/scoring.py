"""How well a detector finds what a set of pictures shows."""

from collections.abc import Iterable, Sequence
from typing import Any

from .datamodule import Question
from .dataset import DetectionSample, DetectionSet
from .evaluation import Evaluation, evaluate_coco
from .inference import Detections, NameChunks, detect
from .modeling import DynamicDinoForObjectDetection
from .text_cache import TextFeatureCache


def score(
    model: DynamicDinoForObjectDetection,
    tokenizer: Any,
    data: DetectionSet,
    batches: Iterable[Question],
    names: Sequence[str] | None = None,
    top: int = 300,
) -> tuple[Evaluation, list[dict[str, Any]]]:
    """COCO's metrics, and the detections they were computed from.

    ``names``: what to ask for in place of the set's own, one for each category; asking for wrong names shows
    how much of the precision comes from the text.
    """
    asked = NameChunks.of(names or data.names, tokenizer, model.config.max_text_tokens)
    text = TextFeatureCache(model)
    results: list[dict[str, Any]] = []
    for batch in batches:
        results += coco_results(data, batch.samples, search(model, asked, batch, text, top))
    return evaluate_coco(data.ground_truth(), results), results


def search(
    model: DynamicDinoForObjectDetection,
    names: NameChunks,
    batch: Question,
    text: TextFeatureCache,
    top: int = 300,
) -> list[Detections]:
    """:func:`~unimoe.detection.inference.detect` on a batch of pictures."""
    return detect(
        model, names, batch.pixel_values, batch.pixel_mask, batch.sizes, text, batch.image_features, top
    )


def coco_results(
    data: DetectionSet, samples: Sequence[DetectionSample], found: Sequence[Detections]
) -> list[dict[str, Any]]:
    """The detections of some pictures as COCO writes them."""
    results = []
    for sample, one in zip(samples, found, strict=True):
        boxes = one.boxes_K4.cpu().clone()
        boxes[:, 2:] -= boxes[:, :2]
        for box, value, label in zip(
            boxes.tolist(), one.scores_K.tolist(), one.labels_K.tolist(), strict=True
        ):
            results.append(
                {
                    "image_id": sample.image_id,
                    "category_id": data.categories[label].id,
                    "bbox": box,
                    "score": value,
                }
            )
    return results
