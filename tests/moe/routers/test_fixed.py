import pytest
import torch

from unimoe.errors import UserError
from unimoe.moe import Context, FixedExpertRouter, RouterDescription


def test_one_expert_takes_all():
    routing = FixedExpertRouter(3, 1)(torch.randn(5, 8), Context())
    assert routing.token_N.tolist() == [0, 1, 2, 3, 4]
    assert routing.offsets_E1.tolist() == [0, 0, 5, 5]
    assert routing.weight_N.tolist() == [1.0] * 5
    with pytest.raises(UserError, match="expert 3 is chosen, expected 0..2"):
        FixedExpertRouter(3, 3)


def test_it_describes_itself():
    assert FixedExpertRouter(3, 1).describe() == RouterDescription(3, 1, fixed=True)
