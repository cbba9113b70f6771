import torch

from unimoe.moe import Context, LayerRecord, Routing, dts_balance


def record(weight: torch.Tensor) -> LayerRecord:
    return LayerRecord(0, Routing.from_mask(weight > 0, weight, weight, weight), Context())


def test_exact_values_of_three_cases():
    """All experts, a balanced choice of one, collapse."""
    dense, balanced, collapsed = torch.full((16, 4), 0.25), torch.eye(4).repeat(4, 1), torch.zeros(16, 4)
    collapsed[:, 2] = 1
    found = dts_balance([record(one) for one in (dense, balanced, collapsed)])
    torch.testing.assert_close(found, torch.tensor([4.0, 1.0, 4.0]))


def test_two_ranks_have_the_loss_of_one(same_on_two_ranks):
    same_on_two_ranks(dts_balance)
