from typing import Any

import pytest
import torch

from unimoe.errors import UserError
from unimoe.moe import (
    Context,
    FFNExperts,
    LatentExperts,
    LayerRecord,
    MoELayer,
    RecurrentRouter,
    SwiGLUExperts,
    TopK,
    coupling,
)


def of(layer: Any, **settings: Any) -> torch.Tensor:
    routing = layer.router(torch.randn(3, 8), Context())
    return coupling([LayerRecord(5, routing, Context())], {5: layer}, **settings)


@pytest.mark.parametrize("experts", [SwiGLUExperts(4, 8, 6), FFNExperts(4, 8, 6)])
@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_it_equals_its_definition(experts, alpha):
    layer: Any = MoELayer(TopK(8, 4, 2, init_std=1.0, null_experts=1), experts).eval()
    first = experts.gate_up_proj[:, :6] if isinstance(experts, SwiGLUExperts) else experts.up_proj
    norm = [[(first[j] @ layer.router.weight[i]).norm().item() for j in range(4)] for i in range(4)]
    expected = sum(
        max(norm[i][j] - alpha * norm[i][i], 0) + max(norm[j][i] - alpha * norm[i][i], 0)
        for i in range(4)
        for j in range(4)
        if j != i
    )
    torch.testing.assert_close(of(layer, alpha=alpha), torch.tensor([expected / 16]))


def test_coupled_experts_have_none():
    layer: Any = MoELayer(TopK(8, 4, 1), SwiGLUExperts(4, 8, 2)).eval()
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(4, 8))
        layer.experts.gate_up_proj.zero_()
        for expert in range(4):
            layer.experts.gate_up_proj[expert, 0, expert] = 1.0
    assert of(layer) == 0


def test_training_lowers_it_through_router_and_experts():
    layer: Any = MoELayer(TopK(8, 4, 1, init_std=0.5), SwiGLUExperts(4, 8, 6, init_std=0.5))
    weights = [layer.router.weight, layer.experts.gate_up_proj]
    before = of(layer.eval())
    assert all(gradient.any() for gradient in torch.autograd.grad(before.sum(), weights))
    for _ in range(30):
        gradients = torch.autograd.grad(of(layer.train()).sum(), weights)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight -= 0.3 * gradient
    assert of(layer.eval()) < 0.7 * before


def test_noise_is_there_in_training_only_and_keeps_rows_apart():
    layer: Any = MoELayer(TopK(8, 4, 1, init_std=1.0), SwiGLUExperts(4, 8, 6, init_std=0.5))
    assert of(layer.train()) != of(layer) and of(layer.eval()) == of(layer)
    with torch.no_grad():
        layer.router.weight[:] = layer.router.weight[0]  # no room for noise
    assert of(layer.train()) == of(layer)


@pytest.mark.parametrize(
    "layer",
    [
        MoELayer(RecurrentRouter(8, 4), SwiGLUExperts(4, 8, 6)),
        MoELayer(TopK(8, 4, 1), LatentExperts(SwiGLUExperts(4, 2, 6), 8, 2)),
    ],
)
def test_other_parts_are_refused(layer):
    with pytest.raises(UserError, match="expected a linear router and FFN experts"):
        of(layer)
