"""Detection in images: boxes whose labels are members of a given list of names.

Shapes: B images, Q queries, L text tokens, C names of a prompt, K detections of an image.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_convert, clip_boxes_to_image
from transformers import PreTrainedTokenizerBase

from unimoe.detection.model.modeling import DynamicDinoForObjectDetection
from unimoe.detection.model.prompt import MAX_TOKENS, Prompt, PromptBatch, check_names, chunk_names
from unimoe.detection.model.text_cache import TextFeatureCache

logger = logging.getLogger(__name__)


@dataclass
class Detections:
    """What was found in one image, best first within each prompt."""

    boxes_K4: Tensor
    """(x1, y1, x2, y2) in pixels of the original image."""
    scores_K: Tensor
    """Between 0 and 1."""
    labels_K: Tensor
    """int64, index into the list of names that was asked for."""

    def select(self, index_K: Tensor) -> "Detections":
        """Some of the detections, in the given order."""
        return Detections(self.boxes_K4[index_K], self.scores_K[index_K], self.labels_K[index_K])


@dataclass
class PromptChunks:
    """A list of names as prompts that fit, made once for many images."""

    names: list[str]
    chunks: list[list[int]]
    """Which names each prompt asks for."""
    prompts: list[Prompt]

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int = MAX_TOKENS,
        max_names: int | None = None,
    ) -> "PromptChunks":
        """Cut a list of names into prompts; more than one is logged.

        Args:
            names: what to look for.
            tokenizer: the detector's.
            max_tokens: of a prompt.
            max_names: limits a prompt's names as well (40 is the custom for LVIS).

        Raises:
            UserError: the tokenizer does not know a name, or does not tell two apart.
        """
        chunks = chunk_names(names, tokenizer, max_tokens, max_names)
        check_names(names, tokenizer)
        if len(chunks) > 1:
            logger.info(
                "%d names do not fit one prompt of %d tokens: asking in %d",
                len(names),
                max_tokens,
                len(chunks),
            )
        prompts = [Prompt.from_names([names[i] for i in chunk], tokenizer, max_tokens) for chunk in chunks]
        return cls(list(names), chunks, prompts)


@torch.no_grad()
def detect(
    model: DynamicDinoForObjectDetection,
    prompts: PromptChunks,
    pixel_values: Tensor | None,
    pixel_mask: Tensor | None,
    sizes: Sequence[tuple[int, int]],
    text: TextFeatureCache,
    image_features: Sequence[Tensor] | None = None,
    top: int = 300,
    threshold: float | Sequence[float] = 0.0,
    one_label: bool = False,
) -> list[Detections]:
    """Look for every name in every image; the backbone runs once, whatever the number of prompts.

    It runs in float32 also inside a run with mixed precision, whose boxes and scores would be rounded to
    eight bits.

    Args:
        model: the detector.
        prompts: what to look for.
        pixel_values: [B, 3, H, W]; not needed with ``image_features``.
        pixel_mask: [B, H, W], None without padding.
        sizes: (width, height) of each image, to whose pixels the boxes are scaled.
        text: cached text features of ``model``.
        image_features: what ``model.encode_image`` gave for these images.
        top: most detections of an image for each prompt.
        threshold: lowest score, or one for each name.
        one_label: give each box its best label only, not every label over the threshold.
    """
    lowest_C = torch.tensor(_thresholds(threshold, len(prompts.names)))
    parts: list[list[Detections]] = []
    with torch.autocast(model.device.type, enabled=False):
        if image_features is None:
            if pixel_values is None:
                raise ValueError("give pixel_values or image_features")
            image_features = model.encode_image(pixel_values, pixel_mask)
        for chunk, prompt in zip(prompts.chunks, prompts.prompts, strict=True):
            batch = PromptBatch.stack([prompt]).to(model.device)
            row = {name: value.expand(len(sizes), *value.shape[1:]) for name, value in batch.inputs().items()}
            output = model(
                pixel_mask=pixel_mask,
                image_features=image_features,
                text_features=text([prompt]).expand(len(sizes), -1, -1),
                **row,
            )
            found = postprocess(
                output.logits[-1],
                output.boxes[-1],
                batch.name_tokens * len(sizes),
                sizes,
                top,
                lowest_C[chunk].tolist(),
                one_label,
            )
            index_C = torch.tensor(chunk, device=model.device)
            parts.append([Detections(one.boxes_K4, one.scores_K, index_C[one.labels_K]) for one in found])
    return [
        Detections(*(torch.cat([getattr(one, key) for one in image]) for key in Detections.__annotations__))
        for image in zip(*parts, strict=True)
    ]


def postprocess(
    logits_BQL: Tensor,
    boxes_BQ4: Tensor,
    name_tokens: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    top: int = 300,
    threshold: float | Sequence[float] = 0.0,
    one_label: bool = False,
) -> list[Detections]:
    """The ``top`` best pairs of a query and a name in each image.

    The score is the mean of the sigmoid over the name's tokens, as in the official COCO evaluation of
    Grounding DINO. ``name_tokens[b]`` is [C, L] bool, ``sizes[b]`` (width, height) in pixels, ``boxes_BQ4``
    (cx, cy, w, h) on a 0..1 scale.
    """
    results = []
    for logits_QL, boxes_Q4, tokens_CL, size in zip(
        logits_BQL.float(), boxes_BQ4.float(), name_tokens, sizes, strict=True
    ):
        weights_CL = tokens_CL.to(logits_QL) / tokens_CL.sum(dim=1, keepdim=True).clamp(min=1)
        scores_QC = logits_QL.sigmoid() @ weights_CL.T
        results.append(select_top(scores_QC, boxes_Q4, size, top, threshold, one_label))
    return results


def select_top(
    scores_QC: Tensor,
    boxes_Q4: Tensor,
    size: tuple[int, int],
    top: int,
    threshold: float | Sequence[float],
    one_label: bool = False,
) -> Detections:
    """The ``top`` best pairs of a query and a name that reach ``threshold``, in an image of (width, height)
    ``size``; boxes are (cx, cy, w, h) on a 0..1 scale."""
    width, height = size
    lowest_C = scores_QC.new_tensor(_thresholds(threshold, scores_QC.shape[1]))
    passed_QC = scores_QC >= lowest_C
    if one_label:
        best_Q1 = scores_QC.masked_fill(~passed_QC, -1).argmax(dim=1, keepdim=True)
        passed_QC = passed_QC & torch.zeros_like(passed_QC).scatter(1, best_Q1, True)
    ranked_QC = scores_QC.masked_fill(~passed_QC, -1)
    _, place_K = ranked_QC.flatten().topk(min(top, scores_QC.numel()))
    place_K = place_K[passed_QC.flatten()[place_K]]
    query_K, label_K = place_K // scores_QC.shape[1], place_K % scores_QC.shape[1]
    boxes_K4 = box_convert(boxes_Q4[query_K], "cxcywh", "xyxy") * boxes_Q4.new_tensor([width, height] * 2)
    return Detections(clip_boxes_to_image(boxes_K4, (height, width)), scores_QC[query_K, label_K], label_K)


def best_first(found: Detections, nms: float | None = None, across_labels: bool = False) -> Detections:
    """The detections of all prompts, sorted by score.

    Args:
        found: of one image.
        nms: leave out a box that overlaps a better one of the same label by more than this IoU.
        across_labels: whatever the labels.
    """
    found = found.select(found.scores_K.argsort(descending=True))
    if nms is None:
        return found
    labels_K = torch.zeros_like(found.labels_K) if across_labels else found.labels_K
    return found.select(batched_nms(found.boxes_K4, found.scores_K, labels_K, nms))


def _thresholds(threshold: float | Sequence[float], count: int) -> list[float]:
    """One for each of ``count`` names."""
    return [float(threshold)] * count if isinstance(threshold, int | float) else list(threshold)
