import pytest
import torch
import torch.nn.functional as F

from unimoe.moe import Context, Routing, TernaryExperts, TopK
from unimoe.moe.experts.ternary import int8, pack, ternary, unpack

D, I = 10, 14  # noqa: E741


def experts(number=3) -> TernaryExperts:
    weights = torch.randn(number, 2 * I, D), torch.randn(number, D, I)
    return TernaryExperts(*(weight.double() for weight in weights))


def routed(x, number=3) -> Routing:
    return TopK(D, number, 2, init_std=1.0)(x, Context())


def test_exact_weights_have_three_values_of_each_matrix():
    weight = torch.randn(3, 5, 7, dtype=torch.float64)
    found, scale = ternary(weight), weight.abs().mean(dim=(1, 2))
    for matrix, a in zip(found, scale, strict=True):
        assert set(matrix.unique().tolist()) == {-a.item(), 0.0, a.item()}
    assert 0.28 < (ternary(torch.randn(1, 400, 400)) == 0).float().mean() < 0.34, "31 % for Gaussian weights"


def test_exact_activations_have_255_values_of_each_token():
    x = torch.randn(6, D, dtype=torch.float64)
    steps = 127 * int8(x) / x.abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-9)
    assert (steps.abs().amax(dim=1).round() == 127).all()
    assert (int8(x) - x).abs().max() <= x.abs().max() / 254 + 1e-12


def test_exact_the_gradient_is_that_of_the_quantized_ffn():
    """Straight through: as if the ternary matrices were the parameters."""
    own, x = experts(), torch.randn(20, D, dtype=torch.float64)
    routing = routed(x)
    weight_N = routing.weight_N.detach()
    own(x, routing, weight_N).square().sum().backward()
    gate_up, down = (ternary(w.detach()) for w in (own.gate_up_proj.unflatten(1, (2, I)), own.down_proj))
    gate_up, down = gate_up.flatten(1, 2).requires_grad_(), down.requires_grad_()
    y = torch.zeros_like(x)
    for n, (token, expert) in enumerate(zip(routing.token_N, routing.expert_N, strict=True)):
        gate, up = (gate_up[expert] @ int8(x[token][None])[0]).chunk(2)
        y = y.index_add(
            0, token[None], (weight_N[n] * (down[expert] @ int8((F.silu(gate) * up)[None])[0]))[None]
        )
    y.square().sum().backward()
    torch.testing.assert_close(own.gate_up_proj.grad, gate_up.grad, rtol=0, atol=1e-9)
    torch.testing.assert_close(own.down_proj.grad, down.grad, rtol=0, atol=1e-9)


@pytest.mark.parametrize("width", [1, 4, 7, 16])
def test_exact_packing_and_unpacking_gives_the_codes_back(width):
    codes = torch.randint(-1, 2, (2, 3, width))
    packed = pack(codes)
    assert packed.shape == (2, 3, -(-width // 4)) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, width).long(), codes)


def test_exact_packed_experts_compute_the_same():
    own, x = experts().float(), torch.randn(20, D)
    routing = routed(x)
    before = own(x, routing, routing.weight_N)
    bytes_before = own.stored_bytes()
    own.pack()
    assert torch.equal(own(x, routing, routing.weight_N), before)
    assert not list(own.parameters()) and own.indivisible
    held = sum(buffer.numel() * buffer.element_size() for buffer in own.buffers())
    assert held == bytes_before == own.stored_bytes() < 3 * 3 * D * I
