"""The criterion against a slow reference that shares no code with it, and its behaviour at the edges."""

import itertools
import math

import pytest
import torch

from unimoe.detection.model.criterion import CriterionConfig, Denoising, DetectionCriterion
from unimoe.detection.model.matching import MatchingCost, match
from unimoe.detection.model.output import DynamicDinoOutput, Target
from unimoe.training import ranks

LAYERS, QUERIES, TOKENS = 2, 5, 9
# two prompts of different lengths and names: (token spans of the names, real tokens)
PROMPTS = [([(1, 2), (3, 5), (6, 7)], 9), ([(1, 4)], 6)]
OBJECTS = [[0, 1, 1], [0]]  # names of the objects of each image


def sample(objects=OBJECTS, dtype=torch.float64, denoised=0):
    """An output that requires gradients, its targets and its name maps."""
    mask = torch.stack([torch.arange(TOKENS) < length for _, length in PROMPTS])
    maps = []
    for spans, _ in PROMPTS:
        maps.append(torch.zeros(len(spans), TOKENS, dtype=torch.bool))
        for row, (start, end) in enumerate(spans):
            maps[-1][row, start:end] = True

    def predict(*shape):
        logits = torch.randn(*shape, TOKENS, dtype=dtype)
        leaf = logits.requires_grad_()
        boxes = torch.rand(*shape, 4, dtype=dtype).mul(0.4).add(0.2).requires_grad_()
        return leaf, leaf.masked_fill(~mask[:, None], -math.inf), boxes

    count = len(objects)
    leaves, logits, boxes = predict(LAYERS, count, QUERIES)
    encoder_leaves, encoder_logits, encoder_boxes = predict(count, QUERIES)
    extra_leaves, extra_logits, extra_boxes = predict(LAYERS, count, denoised)
    output = DynamicDinoOutput(
        logits=logits,
        boxes=boxes,
        encoder_logits=encoder_logits,
        encoder_boxes=encoder_boxes,
        text_mask=mask,
        denoising_logits=extra_logits,
        denoising_boxes=extra_boxes,
    )
    targets = [
        Target(torch.rand(len(names), 4, dtype=dtype).mul(0.4).add(0.2), torch.tensor(names).long())
        for names in objects
    ]
    leaves = [leaves, boxes, encoder_leaves, encoder_boxes, extra_leaves, extra_boxes]
    return output, targets, maps, leaves


def one_image(output, targets, maps, b):
    mine = slice(b, b + 1)
    one = {key: output[key][:, mine] for key in ("logits", "boxes")}
    one |= {key: output[key][mine] for key in ("encoder_logits", "encoder_boxes", "text_mask")}
    return DynamicDinoOutput(**one), targets[mine], maps[mine]


def corners(box):
    x, y, w, h = box
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def slow_giou(one, other):
    a, b = corners(one), corners(other)
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    overlap = width * height if width > 0 and height > 0 else 0.0
    union = one[2] * one[3] + other[2] * other[3] - overlap
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return overlap / union - (hull - union) / hull


def slow_focal(logit, yes):
    p = 1 / (1 + torch.exp(-logit))
    return -0.25 * (1 - p) ** 2 * torch.log(p) if yes else -0.75 * p**2 * torch.log(1 - p)


def slow_pairs(logits, boxes, target, spans):
    """The assignment of least cost by trying all: {query: object}."""
    best, answer = math.inf, {}
    for queries in itertools.permutations(range(len(logits)), len(target.names_M)):
        cost = 0.0
        for m, q in enumerate(queries):
            start, end = spans[target.names_M[m]]
            for t in range(start, end):
                gain = slow_focal(logits[q, t], True) - slow_focal(logits[q, t], False)
                cost += float(gain) / (end - start)
            cost += 5 * float((boxes[q] - target.boxes_M4[m]).abs().sum())
            cost -= 2 * float(slow_giou(boxes[q], target.boxes_M4[m]))
        if cost < best:
            best, answer = cost, dict(zip(queries, range(len(queries)), strict=True))
    return answer


def slow_part(logits, boxes, pairs, target, prompt):
    """(class, l1, giou) sums of one layer of one image."""
    spans, length = prompt
    focal = l1 = giou = torch.zeros((), dtype=torch.float64)
    for q in range(len(logits)):
        m = pairs.get(q)
        start, end = spans[target.names_M[m]] if m is not None else (0, 0)
        for t in range(length):
            focal = focal + slow_focal(logits[q, t], start <= t < end)
        if m is not None:
            l1 = l1 + (boxes[q] - target.boxes_M4[m]).abs().sum()
            giou = giou + 1 - slow_giou(boxes[q], target.boxes_M4[m])
    return torch.stack([focal, l1, giou])


def slow_loss(output, targets, denoising=None):
    weights, count = torch.tensor([2.0, 5.0, 2.0]), sum(len(t.names_M) for t in targets)
    total = torch.zeros((), dtype=torch.float64)
    layers = [*zip(output.logits, output.boxes, strict=True), (output.encoder_logits, output.encoder_boxes)]
    for logits, boxes in layers:
        for b, target in enumerate(targets):
            pairs = slow_pairs(logits[b].detach(), boxes[b].detach(), target, PROMPTS[b][0])
            part = slow_part(logits[b], boxes[b], pairs, target, PROMPTS[b])
            total = total + (weights * part).sum() / count
    if denoising:
        known = [
            {d: int(m) for d, m in enumerate(objects) if m >= 0 and positive[d]}
            for objects, positive in zip(denoising.object_BD, denoising.positive_BD, strict=True)
        ]
        count = sum(len(pairs) for pairs in known)
        for logits, boxes in zip(output.denoising_logits, output.denoising_boxes, strict=True):
            for b, target in enumerate(targets):
                real = denoising.object_BD[b] >= 0  # padding is at the end
                part = slow_part(logits[b][real], boxes[b][real], known[b], target, PROMPTS[b])
                total = total + (weights * part).sum() / count
    return total


@pytest.mark.parametrize("denoised", [0, 6])
def test_loss_and_gradients_equal_the_slow_reference(denoised):
    """Two images whose prompts differ in length and in names, in float64."""
    output, targets, maps, leaves = sample(denoised=denoised)
    denoising = None
    if denoised:
        objects = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 0, -1, -1, -1, -1]])
        positive = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]).bool()
        denoising = Denoising(objects, positive)
    loss = DetectionCriterion()(output, targets, maps, denoising)["loss"]
    wanted = slow_loss(output, targets, denoising)
    torch.testing.assert_close(loss, wanted, rtol=1e-7, atol=0)  # divisors are float32
    used = leaves if denoised else leaves[:4]
    gradients = [torch.autograd.grad(value, used, retain_graph=True) for value in (loss, wanted)]
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_an_image_is_the_same_beside_any_other():
    """The sums of a batch are those of its images alone: no prompt leaks into its neighbour's targets."""
    output, targets, maps, _ = sample()
    losses = [DetectionCriterion()(*one_image(output, targets, maps, b))["loss"] for b in range(2)]
    together = DetectionCriterion()(output, targets, maps)["loss"]
    torch.testing.assert_close(together * 4, losses[0] * 3 + losses[1], rtol=1e-6, atol=0)


def test_the_named_losses_make_up_the_loss():
    output, targets, maps, _ = sample(dtype=torch.float32)
    output.aux_loss = torch.tensor(0.5)
    losses = DetectionCriterion(CriterionConfig(class_weight=3.0))(output, targets, maps)
    last = 3 * losses["class"] + 5 * losses["l1"] + 2 * losses["giou"]
    total = last + losses["auxiliary"] + losses["encoder"] + losses["balance"]
    torch.testing.assert_close(losses["loss"], total)


def test_no_objects_at_all():
    """All-empty targets: the loss is finite, and every prediction still has a gradient (DDP needs that)."""
    output, targets, maps, leaves = sample(objects=[[], []])
    loss = DetectionCriterion()(output, targets, maps)["loss"]
    gradients = torch.autograd.grad(loss, leaves[:4])
    assert loss > 0 and all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0].abs().sum() > 0 and gradients[1].abs().sum() == 0


def test_half_precision_outputs_are_compared_in_full():
    output, targets, maps, _ = sample(dtype=torch.bfloat16)
    loss = DetectionCriterion()(output, targets, maps)["loss"]
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_more_objects_than_queries():
    output, targets, maps, _ = sample(objects=[[0] * (QUERIES + 3), [0]])
    objects = match(output.logits, output.boxes, targets, maps, MatchingCost())
    assert (objects[:, 0] >= 0).all() and (objects[:, 1] >= 0).sum(dim=1).eq(1).all()
    assert DetectionCriterion()(output, targets, maps)["loss"].isfinite()


def test_the_mean_over_two_ranks_is_the_loss_of_one_process(monkeypatch):
    """Each rank has one image, and divides by the mean of both counts."""
    output, targets, maps, _ = sample()
    whole = DetectionCriterion()(output, targets, maps)["loss"]
    other_count = iter([1, 3])

    monkeypatch.setattr(ranks, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks, "get_world_size", lambda: 2)
    monkeypatch.setattr(ranks, "all_reduce", lambda counts: counts.add_(counts.new([next(other_count), 0])))
    losses = [DetectionCriterion()(*one_image(output, targets, maps, b))["loss"] for b in range(2)]
    torch.testing.assert_close(sum(losses) / 2, whole, rtol=1e-6, atol=0)
