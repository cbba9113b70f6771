"""Expert load, co-activation of experts, and the experts of each class.

Shapes: L MoE layers, E experts, Q queries of all images, K = 2 experts of a query, C classes.

Slices of one copy start as twins: their rows in the router are equal, so at first each expert has one
partner. Pairs that are still twins after tuning are counted: fixed partners may be nothing but the start.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torchvision.ops import box_iou
from transformers import PreTrainedTokenizerBase

from unimoe.detection.data.annotations import DetectionSet
from unimoe.detection.data.batches import EvalBatch
from unimoe.detection.inference.detect import PromptChunks
from unimoe.detection.model.modeling import DynamicDinoForObjectDetection
from unimoe.detection.model.prompt import class_prompts
from unimoe.detection.model.text_cache import TextFeatureCache
from unimoe.model.structure import structure_of
from unimoe.moe import ExpertLoad, LayerRecord, record

from .evaluator import detect_batch


@dataclass
class ExpertUsage:
    """The use of the experts, layer by layer."""

    load_LE: Tensor
    """Share of the queries' places that each expert got; rows sum to 1."""
    together_LEE: Tensor
    """Queries that visited both experts; symmetric, 0 on the diagonal."""
    classes: list[str]
    pairs: list[list[tuple[int, int] | None]]
    """Pair, for each layer and class, that most queries of found objects of the class visited."""
    information: list[float]
    """Mutual information of class and pair in each layer, in bits."""
    slices: int
    """Slices of a copy: expert i belongs to copy i // slices."""

    @property
    def partners_L(self) -> Tensor:
        """See :func:`effective_partners`."""
        return effective_partners(self.together_LEE)

    @property
    def twins_L(self) -> Tensor:
        """See :func:`twin_share`."""
        return twin_share(self.together_LEE, self.slices)

    def to_json(self) -> dict[str, Any]:
        return {
            "load": [[round(share, 4) for share in row] for row in self.load_LE.tolist()],
            "together": self.together_LEE.int().tolist(),
            "effective_partners": [round(number, 3) for number in self.partners_L.tolist()],
            "twins": [round(share, 4) for share in self.twins_L.tolist()],
            "classes": self.classes,
            "pairs": self.pairs,
            "information_bits": [round(bits, 3) for bits in self.information],
        }


@torch.no_grad()
def measure_expert_usage(
    model: DynamicDinoForObjectDetection,
    tokenizer: PreTrainedTokenizerBase,
    data: DetectionSet,
    batches: Iterable[EvalBatch],
) -> ExpertUsage:
    """Run the detector over a set and count which experts its queries visit.

    Args:
        model: one with experts in its decoder.
        tokenizer: the model's.
        data: whose categories are asked for.
        batches: its images. A query counts for the class of the object that it overlaps by at least half.
    """
    asked = [prompts[0] for prompts in class_prompts(data.names)]
    prompts = PromptChunks.of(asked, tokenizer, model.config.max_text_tokens)
    text = TextFeatureCache(model)
    chosen: list[list[Tensor]] = []
    labels: list[Tensor] = []
    for batch in batches:
        if not batch.rows:
            continue
        finals: list[Tensor] = []
        handle = model.register_forward_hook(
            lambda _, __, output, finals=finals: finals.append(cast(Any, output).boxes[-1])
        )
        try:
            with record() as records:
                detect_batch(model, prompts, batch, text, top=1)
        finally:
            handle.remove()
        first = finals[0]  # of several prompts
        layers = len(records) // len(finals)
        chosen.append([visited_experts(entry).cpu() for entry in records[:layers]])
        for found_Q4, size, row in zip(first, batch.sizes, batch.rows, strict=True):
            sample = data.samples[row]
            labels.append(_classes(found_Q4, size, sample.boxes_M4, sample.category_M))
    visits_LQE = in_columns([torch.cat(layer) for layer in zip(*chosen, strict=True)], model)
    label_Q = torch.cat(labels)
    tables = [_pairs(visits_QE, label_Q, len(data.names)) for visits_QE in visits_LQE]
    return ExpertUsage(
        ExpertLoad(visits_LQE.sum(1)).share,
        coactivation(visits_LQE),
        data.names,
        [table for table, _ in tables],
        [bits for _, bits in tables],
        slices_of(model),
    )


def visited_experts(entry: LayerRecord) -> Tensor:
    """[Q, E] float, 1 where a query visited an expert; without padding."""
    visits_QE, real_Q = entry.routing.chosen().float(), entry.real_T
    return visits_QE if real_Q is None else visits_QE[real_Q]


def in_columns(visits: Sequence[Tensor], model: DynamicDinoForObjectDetection) -> Tensor:
    """[L, Q, E] the visits of all layers; experts that were pruned keep their columns, of zeros. Merged ones
    have numbers of their own."""
    plan = _plan(model)
    kept = plan.get("keep")
    if plan.get("merge") is not None:
        kept = [range(visits_QX.shape[1]) for visits_QX in visits]
    if kept is None:
        return torch.stack([*visits])
    experts = (model.config.moe or {})["experts"]
    full_LQE = visits[0].new_zeros(len(visits), len(visits[0]), experts["copies"] * experts["slices"])
    for full_QE, visits_QX, columns_X in zip(full_LQE, visits, kept, strict=True):
        full_QE[:, columns_X] = visits_QX
    return full_LQE


def slices_of(model: DynamicDinoForObjectDetection) -> int:
    """Experts that are slices of one copy, side by side; 1 after experts were merged across copies."""
    return 1 if _plan(model).get("merge") is not None else (model.config.moe or {})["experts"]["slices"]


def _plan(model: DynamicDinoForObjectDetection) -> dict[str, Any]:
    """What was done to the experts (:class:`unimoe.compress.plan.Plan`)."""
    return structure_of(model).plan or {}


def coactivation(visits_XQE: Tensor) -> Tensor:
    """[..., E, E] queries that visited both experts, 0 on the diagonal."""
    both_XEE = visits_XQE.transpose(-1, -2) @ visits_XQE
    return both_XEE - torch.diag_embed(torch.diagonal(both_XEE, dim1=-2, dim2=-1))


def effective_partners(together_XEE: Tensor) -> Tensor:
    """[...] exp(entropy) of the partners of an expert, averaged over experts that were used at all."""
    share_XEE = together_XEE / together_XEE.sum(-1, keepdim=True).clamp(min=1)
    entropy_XE = -torch.xlogy(share_XEE, share_XEE).sum(-1)
    used_XE = together_XEE.sum(-1) > 0
    return (entropy_XE.exp() * used_XE).sum(-1) / used_XE.sum(-1).clamp(min=1)


def twin_share(together_XEE: Tensor, slices: int) -> Tensor:
    """[...] share of the pairs that are slices of one copy, as all are at the start."""
    copy_E = torch.arange(together_XEE.shape[-1], device=together_XEE.device) // slices
    same_EE = copy_E[:, None] == copy_E
    return (together_XEE * same_EE).sum((-1, -2)) / together_XEE.sum((-1, -2)).clamp(min=1)


def _classes(found_Q4: Tensor, size: tuple[int, int], boxes_M4: Tensor, class_M: Tensor) -> Tensor:
    """[Q] int64: the class of the object that a query overlaps most, -1 under an IoU of one half."""
    if not len(boxes_M4):
        return torch.full((len(found_Q4),), -1)
    centre_Q2, extent_Q2 = found_Q4.cpu().split(2, dim=1)
    corners_Q4 = torch.cat([centre_Q2 - extent_Q2 / 2, centre_Q2 + extent_Q2 / 2], 1)
    best_Q, object_Q = box_iou(corners_Q4 * torch.tensor([*size, *size]), boxes_M4).max(dim=1)
    return torch.where(best_Q >= 0.5, class_M[object_Q], -1)


def _pairs(visits_QE: Tensor, label_Q: Tensor, classes: int) -> tuple[list[tuple[int, int] | None], float]:
    """The commonest set of experts of each class (its first two members), and the mutual information of class
    and set in bits."""
    rows_PE = visits_QE[label_Q >= 0]
    label_P = label_Q[label_Q >= 0]
    if not len(label_P):
        return [None] * classes, 0.0
    sets_SE, set_P = rows_PE.unique(dim=0, return_inverse=True)
    counts_CS = torch.zeros(classes, len(sets_SE)).index_put((label_P, set_P), torch.ones(len(label_P)), True)
    joint_CS = counts_CS / counts_CS.sum()
    apart_CS = joint_CS.sum(1, keepdim=True) * joint_CS.sum(0, keepdim=True)
    bits = float(
        torch.xlogy(joint_CS, joint_CS / apart_CS.clamp(min=1e-12)).sum() / torch.log(torch.tensor(2.0))
    )
    table: list[tuple[int, int] | None] = []
    for row_S in counts_CS:
        experts = sets_SE[row_S.argmax()].nonzero()[:, 0].tolist()
        pair = next(pairwise(experts), (experts[0], experts[0]))
        table.append(pair if row_S.sum() else None)
    return table, bits
