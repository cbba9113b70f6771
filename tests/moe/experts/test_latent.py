import pytest
import torch

from unimoe.errors import UserError
from unimoe.moe import Context, FFNExperts, LatentExperts, MoELayer, SwiGLUExperts, TopK
from unimoe.moe.parallel import divide_experts


def test_it_is_a_projection_around_the_experts():
    inner = SwiGLUExperts(4, 6, 12, init_std=0.5)
    latent, x = LatentExperts(inner, 16, 6, init_std=0.5), torch.randn(10, 16)
    routing = TopK(16, 4, 2, init_std=1.0)(x, Context())
    expected = inner(x @ latent.down.T, routing, routing.weight_N) @ latent.up.T
    torch.testing.assert_close(latent(x, routing, routing.weight_N), expected)


@pytest.mark.parametrize("inner", [SwiGLUExperts(4, 6, 12), FFNExperts(4, 6, 12)])
def test_gradients_reach_every_weight(inner):
    layer = MoELayer(TopK(16, 4, 2, init_std=1.0), LatentExperts(inner, 16, 6))
    layer(torch.randn(40, 16)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters())


def test_they_are_not_divided_among_processes():
    """Even where a shared matrix has as many rows as there are experts."""
    layer = MoELayer(TopK(16, 4, 2), LatentExperts(SwiGLUExperts(4, 4, 12), 16, 4))
    with pytest.raises(UserError, match="LatentExperts share two matrices.*leave expert_parallel at 1"):
        divide_experts(layer, None, "all_to_all")  # type: ignore[arg-type]


def test_mistakes_name_what_was_found():
    with pytest.raises(UserError, match="size is 20, expected 1..16"):
        LatentExperts(SwiGLUExperts(4, 20, 12), 16, 20)
