"""Runs a detector over a set of images and scores what it finds."""

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from unimoe.detection.data.annotations import DetectionSample, DetectionSet
from unimoe.detection.data.batches import EvalBatch
from unimoe.detection.inference.detect import Detections, PromptChunks, detect
from unimoe.detection.model.modeling import DynamicDinoForObjectDetection
from unimoe.detection.model.prompt import class_prompts
from unimoe.detection.model.text_cache import TextFeatureCache
from unimoe.training.ranks import union_over_ranks

from .average_precision import Evaluation, Style, evaluate_coco

LVIS_NAMES = 40
"""Names of a prompt where LVIS is evaluated, by custom (mmdetection)."""


class DetectionEvaluator:
    """Collects a detector's answers batch by batch, then compares them with the ground truth.

    >>> evaluator = DetectionEvaluator(model, tokenizer, data)
    >>> for batch in eval_dataloader(data, model):
    ...     evaluator.update(batch)
    >>> evaluator.compute().metrics["AP"]
    """

    def __init__(
        self,
        model: DynamicDinoForObjectDetection,
        tokenizer: PreTrainedTokenizerBase,
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
            data: every one of its categories is searched in every image.
            style: ``coco``, or ``lvis-fixed``, which asks for 40 names at a time.
            names: what to ask for in place of the set's own names, one for each category; with wrong names
                the score shows how much of the precision comes from the text.
            top: most detections of an image for each prompt.
            text: features of the model's text encoder, if some are there already.

        Raises:
            UserError: the tokenizer does not know a name, or does not tell two apart.
        """
        self.model, self.data, self.top = model, data, top
        self.style: Style = style
        asked = [prompts[0] for prompts in class_prompts(names or data.names)]
        most = LVIS_NAMES if style == "lvis-fixed" else None
        self.prompts = PromptChunks.of(asked, tokenizer, model.config.max_text_tokens, most)
        self.text = text or TextFeatureCache(model)
        self._found: dict[int, list[dict[str, Any]]] = {}

    @property
    def results(self) -> list[dict[str, Any]]:
        """All detections, as COCO writes them."""
        return [row for rows in self._found.values() for row in rows]

    @property
    def images(self) -> int:
        """How many images were searched."""
        return len(self._found)

    def update(self, batch: EvalBatch) -> None:
        """Run the model on a batch of images."""
        found = detect_batch(self.model, self.prompts, batch, self.text, self.top)
        for row, one in zip(batch.rows, found, strict=True):
            self._found[row] = coco_results(self.data, self.data.samples[row], one)

    def compute(self, searched: bool = False) -> Evaluation:
        """The scores of all detections, those of all ranks together.

        Args:
            searched: count only the images that were searched; else the others of the set are images in which
                nothing was found.

        Raises:
            UserError: the set has no fixed list of classes.
        """
        self._found = union_over_ranks(self._found)
        only = [self.data.samples[row].image_id for row in self._found] if searched else None
        return evaluate_coco(self.data.ground_truth(), self.results, self.style, only)


def exchanged(names: Sequence[str]) -> list[str]:
    """For each category the name of the next one: a control for ``names`` of :class:`DetectionEvaluator`."""
    return [*names[1:], *names[:1]]


def score(
    model: DynamicDinoForObjectDetection,
    tokenizer: PreTrainedTokenizerBase,
    data: DetectionSet,
    batches: Iterable[EvalBatch],
    names: Sequence[str] | None = None,
) -> tuple[Evaluation, list[dict[str, Any]]]:
    """COCO's metrics over some images, and the detections they were computed from."""
    evaluator = DetectionEvaluator(model, tokenizer, data, names=names)
    for batch in batches:
        evaluator.update(batch)
    return evaluator.compute(), evaluator.results


def detect_batch(
    model: DynamicDinoForObjectDetection,
    prompts: PromptChunks,
    batch: EvalBatch,
    text: TextFeatureCache,
    top: int = 300,
) -> list[Detections]:
    """:func:`~unimoe.detection.inference.detect.detect` on a batch of images, perhaps of none."""
    if not batch.rows:
        return []
    return detect(
        model, prompts, batch.pixel_values, batch.pixel_mask, batch.sizes, text, batch.image_features, top
    )


def coco_results(data: DetectionSet, sample: DetectionSample, found: Detections) -> list[dict[str, Any]]:
    """The detections of an image as COCO writes them."""
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
