import pytest
import torch

from unimoe.moe import Context, Router, RouterDescription


def test_a_router_without_forward_says_so():
    with pytest.raises(TypeError, match="must define forward"):
        Router()(torch.zeros(1, 8), Context())


def test_a_router_acts_on_the_load_if_it_defines_how():
    class Acting(Router):
        def after_step(self, load_E):
            pass

    assert Acting().acts_on_load and not Router().acts_on_load


def test_a_router_that_says_nothing_of_itself_counts_as_dense():
    router = Router()
    router.num_experts = 4
    assert router.describe() == RouterDescription(4, 4, fixed=False)
