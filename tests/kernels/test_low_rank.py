import pytest
import torch

from unimoe.kernels.low_rank import low_rank_experts, runs_on
from unimoe.moe import Routing

pytestmark = pytest.mark.usefixtures("operators")
TOKENS, EXPERTS, KEPT = 140, (4, 3, 5), 2  # more tokens than the operator takes at a time


def _case(rank: int, inputs: int, outputs: int, dtype=torch.float32):
    """Banks of which only the last is trained, tokens, outputs so far and a routing."""
    torch.manual_seed(rank)
    banks = [
        (torch.randn(experts * rank, inputs, dtype=dtype), torch.randn(outputs, experts * rank, dtype=dtype))
        for experts in EXPERTS
    ]
    for parameter in banks[-1]:
        parameter.requires_grad_()
    x, y = torch.randn(TOKENS, inputs, dtype=dtype), torch.randn(TOKENS, outputs, dtype=dtype)
    scores = torch.randn(TOKENS, sum(EXPERTS), dtype=dtype)
    scores[:, 1] = -9  # nobody visits the second
    return banks, x.requires_grad_(), y.requires_grad_(), scores.requires_grad_()


def _routing(scores):
    kept, index = scores.topk(KEPT)
    return Routing.from_topk(index, kept.softmax(-1), scores, scores.softmax(-1), sum(EXPERTS))


def _wide(y, x, banks, rank, routing):
    """The definition: every expert for every token, weighted by zero where it is not visited."""
    A, B = torch.cat([A for A, _ in banks]), torch.cat([B for _, B in banks], 1)
    return y + (x @ A.T * routing.dense().repeat_interleave(rank, 1)) @ B.T


def _visit(y, x, banks, rank, routing):
    pairs = (routing.token_N, routing.expert_N, routing.offsets_E1, routing.weight_N)
    return low_rank_experts(y, x, banks, rank, *pairs)


def _leaves(banks, x, y, scores):
    return [x, y, scores, *banks[-1]]


@pytest.mark.parametrize(("rank", "inputs", "outputs"), [(4, 32, 48), (1, 19, 7), (6, 40, 24)])
def test_outputs_and_gradients_equal_the_wide_form_in_float64(rank, inputs, outputs):
    banks, x, y, scores = _case(rank, inputs, outputs)
    out = _visit(y, x, banks, rank, _routing(scores))
    exact = [(A.detach().double(), B.detach().double()) for A, B in banks]
    for parameter in exact[-1]:
        parameter.requires_grad_()
    x64, y64, scores64 = (one.detach().double().requires_grad_() for one in (x, y, scores))
    expected = _wide(y64, x64, exact, rank, _routing(scores64))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(out)
    found = torch.autograd.grad(out, _leaves(banks, x, y, scores), dy)
    wanted = torch.autograd.grad(expected, _leaves(exact, x64, y64, scores64), dy.double())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_a_token_does_not_depend_on_its_neighbours():
    banks, x, y, scores = _case(4, 32, 48)
    with torch.no_grad():
        together = _visit(y, x, banks, 4, _routing(scores))
        for token in (0, 13, TOKENS - 1):
            own = slice(token, token + 1)
            assert torch.equal(_visit(y[own], x[own], banks, 4, _routing(scores[own])), together[own])


def test_frozen_tokens_need_no_gradient_and_y_is_left_alone():
    banks, x, y, scores = _case(4, 32, 48)
    before = y.detach().clone()
    out = _visit(y.detach(), x.detach(), banks, 4, _routing(scores.detach()))
    assert torch.equal(y, before)
    assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(out.sum(), banks[-1]))


def test_runs_on_float32_only():
    assert runs_on(torch.zeros(1))
    assert not runs_on(torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16))
