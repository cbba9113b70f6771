import torch
from torch import nn
from torch.testing import assert_close

from unimoe.moe import Context, LinearExperts, TopK, linear_experts


def test_each_row_goes_through_its_expert():
    experts, router, x_TD = LinearExperts(3, 4), TopK(4, 3, 2), torch.randn(6, 4)
    routing = router(x_TD, Context())
    assert not experts(x_TD, routing, routing.weight_N).any(), "they start at zero"
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    y_TED = torch.einsum("td,eod->teo", x_TD, experts.weight) + experts.bias
    wanted_TD = (routing.dense()[:, :, None] * y_TED).sum(dim=1)
    assert_close(experts(x_TD, routing, routing.weight_N), wanted_TD)


def test_their_width_is_that_of_the_ffn():
    ffn = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    experts = linear_experts([ffn] * 3, slices=2)
    assert experts.weight.shape == (6, 4, 4)
