import pytest
import torch

from unimoe.moe import Context, Router


def test_a_router_without_forward_says_so():
    with pytest.raises(TypeError, match="must define forward"):
        Router()(torch.zeros(1, 8), Context())
