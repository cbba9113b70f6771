"""How well a detector finds what a set of pictures shows."""

from collections.abc import Iterable, Sequence
from typing import Any

from unimoe.detection.data.annotations import DetectionSample, DetectionSet
from unimoe.detection.data.batches import EvalBatch
from unimoe.detection.inference.detect import Detections, PromptChunks, detect
from unimoe.detection.model.modeling import DynamicDinoForObjectDetection
from unimoe.detection.model.text_cache import TextFeatureCache
from unimoe.training.ranks import union_over_ranks

from .average_precision import Evaluation, Style, evaluate_coco

LVIS_NAMES = 40
"""Names of a prompt where LVIS is evaluated, by custom (mmdetection)."""


class DetectionEvaluator:
    """Shows a detector the pictures of a set, batch by batch, and scores all that it found.

    >>> evaluator = DetectionEvaluator(model, tokenizer, data)
    >>> for batch in eval_dataloader(data, model):
    ...     evaluator.update(batch)
    >>> evaluator.compute().metrics["AP"]
    """

    def __init__(
        self,
        model: DynamicDinoForObjectDetection,
        tokenizer: Any,
        data: DetectionSet,
        style: Style = "coco",
        names: Sequence[str] | None = None,
        top: int = 300,
        text: TextFeatureCache | None = None,
    ):
        """
        Args:
            model: the detector, in evaluation mode.
            tokenizer: the detector's.
            data: every one of its categories is asked for, in every picture.
            style: ``coco``, or ``lvis-fixed``, which asks for 40 names at a time.
            names: what to ask for in place of the set's own, one for each category; asking for wrong names
                shows how much of the precision comes from the text.
            top: most detections of a picture for each prompt.
            text: features of the model's text encoder, if some are there already.
        """
        self.model, self.data, self.top = model, data, top
        self.style: Style = style
        most = LVIS_NAMES if style == "lvis-fixed" else None
        self.asked = PromptChunks.of(names or data.names, tokenizer, model.config.max_text_tokens, most)
        self.text = text or TextFeatureCache(model)
        self._found: dict[int, list[dict[str, Any]]] = {}

    @property
    def results(self) -> list[dict[str, Any]]:
        """All detections, as COCO writes them."""
        return [row for rows in self._found.values() for row in rows]

    def update(self, batch: EvalBatch) -> None:
        """Have the model look at some pictures."""
        found = search(self.model, self.asked, batch, self.text, self.top)
        for sample, one in zip(batch.samples, found, strict=True):
            self._found[sample.image_id] = coco_results(self.data, sample, one)

    def compute(self) -> Evaluation:
        """Score what was found, by all ranks together."""
        self._found = union_over_ranks(self._found)
        return evaluate_coco(self.data.ground_truth(), self.results, self.style)


def score(
    model: DynamicDinoForObjectDetection,
    tokenizer: Any,
    data: DetectionSet,
    batches: Iterable[EvalBatch],
    names: Sequence[str] | None = None,
) -> tuple[Evaluation, list[dict[str, Any]]]:
    """COCO's metrics over some images, and the detections they were computed from."""
    evaluator = DetectionEvaluator(model, tokenizer, data, names=names)
    for batch in batches:
        evaluator.update(batch)
    return evaluator.compute(), evaluator.results


def search(
    model: DynamicDinoForObjectDetection,
    names: PromptChunks,
    batch: EvalBatch,
    text: TextFeatureCache,
    top: int = 300,
) -> list[Detections]:
    """:func:`~unimoe.detection.inference.detect.detect` on a batch of pictures."""
    return detect(
        model, names, batch.pixel_values, batch.pixel_mask, batch.sizes, text, batch.image_features, top
    )


def coco_results(data: DetectionSet, sample: DetectionSample, found: Detections) -> list[dict[str, Any]]:
    """The detections of a picture as COCO writes them."""
    boxes_K4 = found.boxes_K4.cpu().clone()
    boxes_K4[:, 2:] -= boxes_K4[:, :2]
    return [
        {
            "image_id": sample.image_id,
            "category_id": data.categories[label].id,
            "bbox": box,
            "score": value,
        }
        for box, value, label in zip(
            boxes_K4.tolist(), found.scores_K.tolist(), found.labels_K.tolist(), strict=True
        )
    ]
