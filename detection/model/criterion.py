"""The training objective of Grounding DINO (arXiv 2303.05499, section 3.5) for prompts that differ by image.

Shapes: N layers, B images, Q queries, D denoising queries, L text tokens, C names of a prompt, M objects of
an image, K pairs of a query and its object.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss

from unimoe.training.ranks import mean_over_ranks

from .matching import MatchingCost, match
from .output import DynamicDinoOutput, Target


@dataclass
class CriterionConfig:
    """Weights as in DINO, Open-GroundingDino and Dynamic-DINO."""

    class_weight: float = 2.0
    """Weight of the focal loss."""
    l1_weight: float = 5.0
    """Weight of the L1 distance of boxes."""
    giou_weight: float = 2.0
    """Weight of 1 - GIoU."""
    alpha: float = 0.25
    """Focal loss: weight of positives; negatives have 1 - alpha."""
    gamma: float = 2.0
    """Focal loss: focusing parameter, which down-weights easy tokens."""
    matching: MatchingCost = field(default_factory=MatchingCost)
    """Costs of the assignment of queries to objects."""


@dataclass
class Denoising:
    """Targets of the denoising queries."""

    object_BD: Tensor
    """int64, index of the object in its image; -1 on padding."""
    positive_BD: Tensor
    """bool, whether the query must find that object; a negative one must find nothing."""

    @property
    def pairs(self) -> int:
        """Number of positive queries."""
        return int((self.positive_BD & (self.object_BD >= 0)).sum())


class DetectionCriterion(nn.Module):
    """The losses of an output, given the objects.

    1. The decoder's layers and the encoder's proposals are stacked; each is matched independently.
    2. Focal loss over the tokens of the prompt: for a query with an object the tokens of its name are
       positives and all others negatives; for a query without one all are negatives.
    3. L1 and GIoU losses of the boxes of matched pairs.
    4. All are divided by the number of objects (the mean over ranks, at least 1).
    5. Denoising queries, whose objects are known, go through 2 to 4 without matching.
    """

    def __init__(self, config: CriterionConfig | None = None):
        super().__init__()
        self.config = config or CriterionConfig()

    def forward(
        self,
        output: DynamicDinoOutput,
        targets: Sequence[Target],
        name_tokens: Sequence[Tensor],
        denoising: Denoising | None = None,
    ) -> dict[str, Tensor]:
        """The losses by name, 0-d, at least float32.

        ``class``, ``l1``, ``giou`` are those of the last layer, unweighted; ``auxiliary`` (the layers before
        it), ``encoder`` (the proposals), ``denoising`` and ``balance`` are weighted sums. ``loss`` is the
        total to minimise. ``name_tokens[b]`` is [C, L] bool; an image without objects has a Target with no
        rows.
        """
        # (1)
        logits_NBQL = _with_proposals(output.logits, output.encoder_logits)
        boxes_NBQ4 = _with_proposals(output.boxes, output.encoder_boxes)
        assert output.text_mask is not None
        objects = [
            Target(target.boxes_M4.to(boxes_NBQ4), target.names_M.to(boxes_NBQ4.device)) for target in targets
        ]
        names = [tokens_CL.to(boxes_NBQ4.device) for tokens_CL in name_tokens]
        object_NBQ = match(logits_NBQL, boxes_NBQ4, objects, names, self.config.matching)
        real_BQL = output.text_mask[:, None].expand(-1, logits_NBQL.shape[2], -1)
        counts = [sum(len(target.names_M) for target in targets), denoising.pairs if denoising else 0]
        divisor, denoising_divisor = mean_over_ranks(
            torch.tensor(counts, dtype=torch.float32, device=logits_NBQL.device)
        ).clamp(min=1)
        parts = self._compare(logits_NBQL, boxes_NBQ4, object_NBQ, real_BQL, objects, names, divisor)
        total_N = self._weigh(parts)
        losses = {name: part_N[-2] for name, part_N in parts.items()}
        losses |= {"auxiliary": total_N[:-2].sum(), "encoder": total_N[-1]}
        loss = total_N.sum()
        # (5)
        if denoising is not None:
            losses["denoising"] = self._denoising(output, denoising, objects, names, denoising_divisor)
            loss = loss + losses["denoising"]
        if output.aux_loss is not None:
            losses["balance"] = output.aux_loss
            loss = loss + output.aux_loss
        return {"loss": loss, **losses}

    def _denoising(
        self,
        output: DynamicDinoOutput,
        denoising: Denoising,
        targets: Sequence[Target],
        name_tokens: Sequence[Tensor],
        divisor: Tensor,
    ) -> Tensor:
        logits, boxes, mask_BL = output.denoising_logits, output.denoising_boxes, output.text_mask
        assert logits is not None and boxes is not None and mask_BL is not None
        logits_NBDL, boxes_NBD4 = _full_precision(logits), _full_precision(boxes)
        object_BD = denoising.object_BD.to(boxes_NBD4.device)
        wanted_BD = object_BD.masked_fill(~denoising.positive_BD.to(object_BD.device), -1)
        wanted_NBD = wanted_BD.expand(len(boxes_NBD4), -1, -1)
        real_BDL = mask_BL[:, None] & (object_BD >= 0)[..., None]
        parts = self._compare(logits_NBDL, boxes_NBD4, wanted_NBD, real_BDL, targets, name_tokens, divisor)
        return self._weigh(parts).sum()

    def _compare(
        self,
        logits_NBQL: Tensor,
        boxes_NBQ4: Tensor,
        object_NBQ: Tensor,
        real_BQL: Tensor,
        targets: Sequence[Target],
        name_tokens: Sequence[Tensor],
        divisor: Tensor,
    ) -> dict[str, Tensor]:
        """Each term of the loss for each layer, [N]. Queries whose object is -1 must find nothing."""
        # (2)
        wanted = []
        for b, (target, tokens_CL) in enumerate(zip(targets, name_tokens, strict=True)):
            none_1L = tokens_CL.new_zeros(1, tokens_CL.shape[1])  # selected by index -1
            wanted.append(torch.cat([tokens_CL[target.names_M], none_1L])[object_NBQ[:, b]])
        wanted_NBQL = torch.stack(wanted, dim=1).to(logits_NBQL)
        focal_NBQL = sigmoid_focal_loss(
            logits_NBQL.masked_fill(~real_BQL, 0.0), wanted_NBQL, self.config.alpha, self.config.gamma
        )
        class_N = (focal_NBQL * real_BQL).sum(dim=(1, 2, 3))
        # (3)
        layer_K, image_K, query_K = (object_NBQ >= 0).nonzero(as_tuple=True)
        first_B = torch.tensor([0] + [len(target.names_M) for target in targets]).cumsum(0)
        object_K = first_B.to(object_NBQ.device)[image_K] + object_NBQ[layer_K, image_K, query_K]
        found_K4 = boxes_NBQ4[layer_K, image_K, query_K]
        wanted_K4 = torch.cat([target.boxes_M4 for target in targets])[object_K]
        l1_K = (found_K4 - wanted_K4).abs().sum(dim=1)
        giou_K = generalized_box_iou_loss(
            box_convert(found_K4, "cxcywh", "xyxy"), box_convert(wanted_K4, "cxcywh", "xyxy")
        )
        none_N = class_N.new_zeros(len(class_N))
        l1_N, giou_N = none_N.index_add(0, layer_K, l1_K), none_N.index_add(0, layer_K, giou_K)
        # (4)
        return {"class": class_N / divisor, "l1": l1_N / divisor, "giou": giou_N / divisor}

    def _weigh(self, parts: dict[str, Tensor]) -> Tensor:
        config = self.config
        return (
            config.class_weight * parts["class"]
            + config.l1_weight * parts["l1"]
            + config.giou_weight * parts["giou"]
        )


def _with_proposals(layers: Tensor | None, proposals: Tensor | None) -> Tensor:
    """Predictions of all layers, followed by those of the proposals."""
    assert layers is not None and proposals is not None
    return _full_precision(torch.cat([layers, proposals[None]]))


def _full_precision(x: Tensor) -> Tensor:
    """Convert to float32 at least, since half precision rounds small focal terms to zero."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
