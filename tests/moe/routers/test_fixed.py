import pytest
import torch

from unimoe.errors import UserError
from unimoe.moe import Context, OneExpert


def test_one_expert_takes_all():
    routing = OneExpert(3, 1)(torch.randn(5, 8), Context())
    assert routing.token_N.tolist() == [0, 1, 2, 3, 4]
    assert routing.offsets_E1.tolist() == [0, 0, 5, 5]
    assert routing.weight_N.tolist() == [1.0] * 5
    with pytest.raises(UserError, match="expert 3 is chosen, expected 0..2"):
        OneExpert(3, 3)
