import torch

from unimoe.moe import SwiGLUExperts
from unimoe.moe.dispatcher import Dispatcher
from unimoe.moe.routing import Routing


def test_every_token_gets_the_weighted_sum_of_its_experts():
    torch.manual_seed(0)
    experts, x_TD = SwiGLUExperts(3, 8, 16), torch.randn(5, 8)
    chosen_TE = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1], [0, 0, 1]]).bool()
    weight_TE = torch.rand(5, 3)
    routing = Routing.from_mask(chosen_TE, weight_TE, weight_TE.log(), weight_TE)
    weight_N = torch.cat([weight_TE[chosen_TE[:, expert], expert] for expert in range(3)])  # by expert
    y_TD = Dispatcher()(experts, x_TD, routing, weight_N)
    alone_ETD = torch.stack(
        [
            torch.nn.functional.linear(_inner(x_TD, experts.gate_up_proj[expert]), experts.down_proj[expert])
            for expert in range(3)
        ]
    )
    expected_TD = torch.einsum("te,etd->td", weight_TE * chosen_TE, alone_ETD)
    torch.testing.assert_close(y_TD, expected_TD)
    assert not y_TD[2].any()  # a token without experts


def _inner(x_TD, gate_up_XD):
    gate_TI, up_TI = torch.nn.functional.linear(x_TD, gate_up_XD).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate_TI) * up_TI
