import torch
from torch import nn
from torch.testing import assert_close

from unimoe.moe import Context, FiLMExperts, MoELayer, TopK, film_experts


def test_exact_in_front_of_an_ffn_they_start_as_that_ffn():
    ffn = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)).double()
    layer = MoELayer(TopK(4, 3, 2), FiLMExperts(3, 4), finish=lambda x, y: ffn(y)).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    assert_close(layer(x), ffn(x), rtol=0, atol=1e-9)


def test_each_row_is_scaled_and_shifted_by_its_expert():
    experts, router, x_TD = FiLMExperts(3, 4), TopK(4, 3, 2), torch.randn(6, 4)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    routing = router(x_TD, Context())
    scale_TED = torch.einsum("td,eod->teo", x_TD, experts.scale) + experts.scale_bias
    shift_TED = torch.einsum("td,eod->teo", x_TD, experts.shift) + experts.shift_bias
    wanted_TD = (routing.dense()[:, :, None] * (scale_TED * x_TD[:, None] + shift_TED)).sum(dim=1)
    assert_close(experts(x_TD, routing, routing.weight_N), wanted_TD)


def test_an_expert_costs_two_matrices_and_their_biases():
    ffn = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    few, many = (sum(p.numel() for p in film_experts([ffn] * n, slices=2).parameters()) for n in (1, 2))
    assert many - few == 2 * 2 * (4**2 + 4)
