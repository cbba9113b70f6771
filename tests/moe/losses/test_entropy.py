import math

import torch

from unimoe.moe import Context, LayerRecord, Routing, TopK, entropy


def record(logits: torch.Tensor, ctx: Context | None = None) -> LayerRecord:
    index, E = logits.topk(1).indices, logits.shape[1]
    routing = Routing.from_topk(index, torch.ones_like(index).float(), logits, logits.softmax(-1), E)
    return LayerRecord(0, routing, ctx or Context())


def test_it_is_zero_when_sure_and_log_e_when_not():
    sure = torch.full((8, 4), -200.0)
    sure[:, 1] = 200.0
    sure.requires_grad_()
    found = entropy([record(torch.zeros(8, 4)), record(sure)], {})
    torch.testing.assert_close(found, torch.tensor([math.log(4), 0.0]))
    found.sum().backward()
    assert sure.grad is not None and sure.grad.isfinite().all()


def test_padding_counts_nowhere():
    logits, pad = torch.randn(12, 4), torch.arange(12) < 3
    found = entropy([record(logits, Context(pad_T=pad))], {})
    torch.testing.assert_close(found, entropy([record(logits[3:])], {}))
    assert entropy([record(logits, Context(pad_T=torch.ones(12, dtype=torch.bool)))], {}) == 0


def test_its_gradient_sharpens_the_choice():
    router, x = TopK(8, 4, 2, init_std=0.5), torch.randn(32, 8)
    for _ in range(10):
        loss = entropy([LayerRecord(0, router(x, Context()), Context())], {}).sum()
        router.weight.data -= torch.autograd.grad(loss, router.weight)[0]
    assert entropy([LayerRecord(0, router(x, Context()), Context())], {}).sum() < loss


def test_two_ranks_have_the_loss_of_one(same_on_two_ranks):
    same_on_two_ranks(entropy)
