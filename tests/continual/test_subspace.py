import pytest
import torch

from unimoe.continual.subspace import Subspace, outside, principal
from unimoe.errors import UserError


def test_the_fewest_directions_that_cover_enough():
    tokens_TD = torch.diag(torch.tensor([8.0, 4, 2, 1]))  # energies 64, 16, 4 and 1 of 85
    nothing, first = torch.empty(0, 4), torch.eye(4)[:1]
    assert [len(principal(tokens_TD, nothing, share)) for share in (0.7, 0.9, 0.95, 0.99)] == [1, 2, 3, 4]
    assert [len(principal(tokens_TD, first, share)) for share in (0.7, 0.9)] == [0, 1]
    torch.testing.assert_close(principal(tokens_TD, first, 0.9).abs(), torch.eye(4)[1:2])


def test_what_is_outside_is_orthogonal():
    basis_OD = torch.linalg.qr(torch.randn(6, 3)).Q.T
    rest_TD = outside(torch.randn(5, 6), basis_OD)
    assert (rest_TD @ basis_OD.T).abs().max() < 1e-5
    torch.testing.assert_close(outside(rest_TD, basis_OD), rest_TD)


@pytest.mark.parametrize("settings", [{"energy": 1.0}, {"energy": 0.0}, {"samples": 0}])
def test_settings(settings):
    with pytest.raises(UserError, match="energy must lie between 0 and 1 and samples be above 0"):
        Subspace(**settings)
