import pytest
import torch

from unimoe.errors import UserError
from unimoe.kernels import native, packed
from unimoe.kernels.packed import Stack, quantize_rtn
from unimoe.kernels.swiglu import swiglu_experts_reference

from .conftest import error, packed_reference, stack_of

TOLERANCE = 1e-5
"""Of the largest value. Integer sums are exact; the sum over groups is in float32."""
LEVELS = [(bits, nested, 0) for bits in packed.BITS for nested in (False, True)]
LEVELS += [(4, True, 2), (4, True, 3), (8, True, 4), (8, True, 5), (8, True, 6), (8, True, 7)]
FORMS = ("plain", "avx2", "avx512-vnni", "neon-dot")


@pytest.fixture(params=FORMS)
def form(request, built):
    """Each form of the operators that this processor has."""
    if native.ops() is None:
        pytest.skip("UNIMOE_NATIVE is 0, or the library does not load")
    forms = torch.ops.unimoe.packed_forms()
    if request.param not in forms:
        pytest.skip(f"this processor has only {', '.join(forms)}")
    torch.ops.unimoe.packed_use(request.param)
    with torch.inference_mode():
        yield request.param
    torch.ops.unimoe.packed_use(forms[0])


@pytest.mark.parametrize("bits, nested", [(bits, nested) for bits in packed.BITS for nested in (False, True)])
@pytest.mark.parametrize("rows, width, group, halves", [(40, 96, 24, 2), (48, 128, 64, 1), (33, 6, 3, 1)])
def test_a_round_trip_is_exact(bits, nested, rows, width, group, halves):
    weights = [torch.randn(rows, width) for _ in range(2)]
    stack = stack_of(*weights, bits=[bits, 4], group=group, nested=nested, halves=halves)
    for e, weight in enumerate(weights):
        q, scale = quantize_rtn(weight, stack.bits[e], group)
        q_back, scale_back = stack.unpack(e)
        assert torch.equal(q_back, q) and torch.equal(scale_back, scale)
        dense = (q.float().unflatten(1, (-1, group)) * scale[..., None]).flatten(1)
        assert torch.equal(stack.dequantize(e), dense)
        if halves == 1:
            row_X = torch.tensor([0, rows - 1, 5])
            assert torch.equal(stack.take(e, row_X), dense[row_X])


@pytest.mark.parametrize("bits", packed.BITS)
def test_rounding_to_nearest(bits):
    weight = torch.randn(8, 64)
    q, scale = quantize_rtn(weight, bits, 32)
    low, high = (-1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert q.min() == low and q.max() <= high
    dense = (q.float().unflatten(1, (-1, 32)) * scale[..., None]).flatten(1)
    step = scale.abs().repeat_interleave(32, 1)
    if bits == 1:
        assert torch.equal(q, torch.where(weight < 0, -1, 1).to(torch.int8))
    else:  # half a step, and what float16 takes from the scale; one step at the short end of the range
        assert ((dense - weight).abs() <= step * torch.where(q == high, 1.01, 0.51)).all()
    assert quantize_rtn(torch.zeros(2, 32), bits, 32)[1].abs().max() == 0


def test_the_first_planes_are_a_coarser_code():
    stack = stack_of(torch.randn(32, 64), bits=[8], group=64, nested=True)
    exact = stack.dequantize(0)
    errors = [(stack.dequantize(0, level) - exact).square().mean().sqrt() for level in (4, 5, 6, 7)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert 1.8 < coarse / fine < 2.6  # half of it with each bit
    q, scale = stack.unpack(0)
    middle = (q.int() + 128 >> 4) * 16 - 128 + 7.5
    torch.testing.assert_close(stack.dequantize(0, 4), middle * scale)


@pytest.mark.parametrize("bits, nested, level", LEVELS)
def test_linear_equals_the_reference(form, bits, nested, level):
    for rows, width, group in ((48, 128, 64), (33, 96, 24), (5, 32, 32)):
        stack, bias = (
            stack_of(torch.randn(rows, width), bits=[bits], group=group, nested=nested),
            torch.randn(rows),
        )
        for n in (1, 2, 3, 4, 7):
            x = torch.randn(1, n, width)
            expected = packed.linear_reference(x[0], stack, 0, level) + bias
            assert error(packed.linear(x, stack, bias, level)[0], expected) < TOLERANCE


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("group", [16, 8])
def test_experts_of_mixed_bits_equal_the_reference(form, act, group):
    T, H, I, bits = 5, 48, 40 if group == 8 else 48, [4, 2, 8, 3, 1]  # noqa: E741
    gate_up = stack_of(*torch.randn(5, 2 * I, H) * 0.2, bits=bits, group=group, halves=2)
    down = stack_of(*torch.randn(5, H, I) * 0.2, bits=bits, group=group)
    x, token_N, weight_N = torch.randn(T, H), torch.randint(0, T, (20,)), torch.rand(20)
    offsets_E1 = torch.tensor([0, 5, 5, 14, 15, 20])
    pairs = (x, token_N, offsets_E1, weight_N, gate_up, down)
    found = packed.fused_experts(*pairs, torch.tensor(bits, dtype=torch.uint8), act)
    # an activation at the edge of two codes may be rounded to the other one
    assert error(found, packed_reference(*pairs, act)) < 2e-3


def test_more_rows_than_are_multiplied_at_a_time(form):
    stack, x = stack_of(torch.randn(20, 32), bits=[4], group=32), torch.randn(300, 32)
    together = packed.linear(x, stack)
    assert error(together, packed.linear_reference(x, stack, 0)) < TOLERANCE
    for rows in (1, 2, 5):
        assert torch.equal(packed.linear(x[-rows:], stack), together[-rows:])  # none depends on the others


def test_many_pairs_of_experts(form):
    gate_up = stack_of(*torch.randn(2, 64, 32) * 0.2, bits=[4, 8], group=32, halves=2)
    down = stack_of(*torch.randn(2, 32, 32) * 0.2, bits=[4, 8], group=32)
    x, token_N, weight_N = torch.randn(50, 32), torch.randint(0, 50, (400,)), torch.rand(400)
    pairs = (x, token_N, torch.tensor([0, 330, 400]), weight_N, gate_up, down)
    found = packed.fused_experts(*pairs, torch.tensor([4, 8], dtype=torch.uint8))
    assert error(found, packed_reference(*pairs)) < 2e-3


def test_forms_agree(built):
    if native.ops() is None:
        pytest.skip("UNIMOE_NATIVE is 0, or the library does not load")
    stack, x = stack_of(torch.randn(64, 64), bits=[8], group=32), torch.randn(3, 64)
    forms = torch.ops.unimoe.packed_forms()
    outputs = []
    with torch.inference_mode():
        for one in forms:
            torch.ops.unimoe.packed_use(one)
            outputs.append(packed.linear(x, stack))
        torch.ops.unimoe.packed_use(forms[0])
    for other in outputs[1:]:
        assert error(other, outputs[0]) < TOLERANCE  # integer sums are equal, sums over groups round


def test_odd_activations(form):
    stack = stack_of(torch.randn(16, 32), bits=[4], group=32)
    x = torch.zeros(4, 32)
    x[1, 3], x[2, 0] = float("nan"), 1e-40
    x[3] = torch.randn(32) * 1e20
    y = packed.linear(x, stack)
    assert y[0].count_nonzero() == y[2].count_nonzero() == 0 and y[1].isnan().all()
    assert error(y[3], packed.linear_reference(x[3:], stack, 0)[0]) < TOLERANCE
    assert packed.linear(torch.ones(0, 32), stack).shape == (0, 16)


def test_error_of_activations_of_8_bits():
    """Against float products with the same weights."""
    stack, x = stack_of(torch.randn(64, 256), bits=[4], group=64), torch.randn(8, 256)
    exact = x @ stack.dequantize(0).t()
    assert 1e-3 < error(packed.linear_reference(x, stack, 0), exact) < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_is_that_of_the_dense_product(dtype):
    stack = stack_of(torch.randn(32, 64), bits=[4], group=32)
    x = torch.randn(3, 64, dtype=dtype, requires_grad=True)
    packed.linear(x, stack).sum().backward()
    expected = stack.dequantize(0).to(dtype).sum(0).expand(3, -1)
    torch.testing.assert_close(x.grad, expected, rtol=2e-2, atol=2e-2 if dtype is torch.bfloat16 else 1e-5)


def test_gradients_of_experts_reach_tokens_and_routing_weights():
    H, I = 32, 16  # noqa: E741
    gate_up = stack_of(*torch.randn(2, 2 * I, H) * 0.2, bits=[4, 8], group=16, halves=2)
    down = stack_of(*torch.randn(2, H, I) * 0.2, bits=[4, 8], group=16)
    leaves = [torch.randn(3, H).requires_grad_(), torch.rand(4).requires_grad_()]
    token_N, offsets_E1 = torch.tensor([0, 2, 1, 2]), torch.tensor([0, 2, 4])
    found = packed.fused_experts(
        leaves[0], token_N, offsets_E1, leaves[1], gate_up, down, torch.tensor([4, 8], dtype=torch.uint8)
    )
    dense = [torch.stack([stack.dequantize(e) for e in (0, 1)]) for stack in (gate_up, down)]
    rows = swiglu_experts_reference(leaves[0][token_N], offsets_E1, *dense, leaves[1])
    expected = torch.zeros(3, H).index_add(0, token_N, rows)
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", [0, 48, 1024])
def test_a_group_that_does_not_fit_is_refused(group):
    with pytest.raises(UserError, match=f"the group {group} does not divide the width 1024"):
        Stack.empty([4], 16, 1024, group)


def test_other_bits_and_codes_out_of_range_are_refused():
    with pytest.raises(UserError, match="got 5 bits, expected one of 1, 2, 3, 4, 8"):
        Stack.empty([5], 16, 32, 32)
    stack = Stack.empty([2], 16, 32, 32)
    with pytest.raises(UserError, match="codes are out of range for 2 bits"):
        stack.fill(0, torch.full((16, 32), 2, dtype=torch.int8), torch.ones(16, 1))
