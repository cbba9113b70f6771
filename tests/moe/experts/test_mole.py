import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from unimoe.errors import UserError
from unimoe.moe import Context, MoELayer, MoLEExperts, TopK
from unimoe.moe.parallel import divide_experts

D, I, M = 16, 12, 6  # noqa: E741


def test_exact_each_expert_is_the_product_of_its_factors():
    experts, x = MoLEExperts(4, 2, D, I, M, init_std=0.5).double(), torch.randn(10, D, dtype=torch.float64)
    routing = TopK(D, 4, 2, init_std=1.0)(x, Context())
    expected = torch.zeros_like(x)
    for token, expert, weight in zip(routing.token_N, routing.expert_N, routing.weight_N, strict=True):
        (B_gate, B_up), (A_gate, A_up) = experts.into[expert // 2].chunk(2), experts.out[expert].chunk(2)
        inner = F.silu(A_gate @ B_gate @ x[token]) * (A_up @ B_up @ x[token])
        expected[token] += weight * (experts.down_proj[expert] @ inner)
    torch.testing.assert_close(experts(x, routing, routing.weight_N), expected, rtol=0, atol=1e-9)


def test_the_shared_factor_runs_once_for_each_token_of_a_group():
    layer, x = MoELayer(TopK(D, 4, 4), MoLEExperts(4, 1, D, I, M)), torch.randn(10, D)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    once, each = 2 * 10 * 2 * M * D, 2 * 40 * (2 * I * M + I * D)
    assert counter.get_total_flops() == once + each + 2 * 10 * D * 4  # and the router


def test_gradients_reach_every_weight():
    layer = MoELayer(TopK(D, 4, 2, init_std=1.0), MoLEExperts(4, 2, D, I, M))
    layer(torch.randn(40, D)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters())


def test_active_parameters_count_a_shared_factor_once():
    experts = MoLEExperts(4, 1, D, I, M)
    assert experts.active_parameters(2) == 2 * M * D + 2 * (2 * I * M + I * D)


def test_mistakes_name_what_was_found():
    with pytest.raises(UserError, match="size is 20, expected 1..16"):
        MoLEExperts(4, 2, D, I, 20)
    with pytest.raises(UserError, match="4 MoLE experts in 3 groups"):
        MoLEExperts(4, 3, D, I, M)
    with pytest.raises(UserError, match="MoLEExperts share matrices in groups.*leave expert_parallel at 1"):
        divide_experts(MoELayer(TopK(D, 4, 2), MoLEExperts(4, 4, D, I, M)), None, "all_to_all")  # type: ignore[arg-type]
