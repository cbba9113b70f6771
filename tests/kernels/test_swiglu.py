import os
import weakref
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks

from unimoe.errors import UserError
from unimoe.kernels import arguments
from unimoe.kernels.swiglu import fused_experts, swiglu_experts_reference

H, I = 12, 20  # noqa: E741
GROUPINGS = {
    "even": [3, 3, 3],
    "an empty expert": [4, 0, 2],
    "one takes all": [0, 6, 0],
    "a single row": [0, 0, 1],
    "no rows": [0, 0, 0],
}


pytestmark = pytest.mark.usefixtures("loop")


def case(counts, dtype=torch.float64, hidden=H, inner=I) -> Any:
    E, N = len(counts), sum(counts)
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    x = torch.randn(N, hidden, dtype=dtype, requires_grad=True)
    gate_up = torch.randn(E, 2 * inner, hidden, dtype=dtype, requires_grad=True)
    down = torch.randn(E, hidden, inner, dtype=dtype, requires_grad=True)
    weight = torch.rand(N, dtype=dtype, requires_grad=True)
    return x, offsets, gate_up, down, weight


def gradients(function, tensors, grad):
    offsets = tensors[1]
    leaves = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    y = function(*tensors)
    assert offsets is tensors[1]
    return [y, *torch.autograd.grad(y, leaves, grad)]


@pytest.mark.parametrize("counts", GROUPINGS.values(), ids=GROUPINGS.keys())
@pytest.mark.parametrize("weighted", [True, False])
def test_equals_the_reference_with_every_gradient(counts, weighted):
    tensors: Any = list(case(counts))
    if not weighted:
        tensors[4] = None
    grad = torch.randn(sum(counts), H, dtype=torch.float64)
    for ours, plain in zip(
        gradients(fused_experts, tensors, grad),
        gradients(swiglu_experts_reference, tensors, grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", [fused_experts, swiglu_experts_reference])
def test_gradcheck(function):
    x, offsets, gate_up, down, weight = case([2, 0, 1], hidden=3, inner=4)
    assert gradcheck(lambda *args: function(args[0], offsets, *args[1:]), (x, gate_up, down, weight))


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh"])
def test_other_gates_have_the_gradients_of_the_reference(act):
    tensors, grad = case([3, 0, 2]), torch.randn(5, H, dtype=torch.float64)
    for ours, plain in zip(
        gradients(lambda *args: fused_experts(*args, act=act), tensors, grad),
        gradients(lambda *args: swiglu_experts_reference(*args, act=act), tensors, grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_an_unknown_gate_is_a_user_error():
    with pytest.raises(UserError, match="activation 'tanh', expected one of silu, gelu, gelu_tanh"):
        fused_experts(*case([1]), act="tanh")


def test_gate_weight_of_zero_has_the_right_gradient():
    x, offsets, gate_up, down, weight = case([2, 2])
    with torch.no_grad():
        weight.zero_()
    tensors = (x, offsets, gate_up, down, weight)
    grad = torch.randn(4, H, dtype=torch.float64)
    ours, plain = gradients(fused_experts, tensors, grad), gradients(swiglu_experts_reference, tensors, grad)
    torch.testing.assert_close(ours, plain)
    assert ours[-1].abs().min() > 0


@pytest.mark.parametrize("trained", range(16))
def test_every_frozen_subset(trained):
    tensors = case([3, 0, 2])
    for bit, i in enumerate((0, 2, 3, 4)):
        tensors[i].requires_grad_(bool(trained >> bit & 1))
    if not trained:
        assert not fused_experts(*tensors).requires_grad
        return
    grad = torch.randn(5, H, dtype=torch.float64)
    torch.testing.assert_close(
        gradients(fused_experts, tensors, grad), gradients(swiglu_experts_reference, tensors, grad)
    )


def test_no_weight_gradient_work_for_frozen_weights(loop, monkeypatch):
    """Counts multiplications: input gradient only is three products per expert, not seven."""
    if loop == "native":
        pytest.skip("products in C++ cannot be counted")
    tensors = case([3, 2])
    for i in (2, 3):
        tensors[i].requires_grad_(False)
    y = fused_experts(*tensors)
    products = []
    plain = torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda a, b, **kw: products.append((a.shape, b.shape)) or plain(a, b, **kw)
    )
    y.sum().backward()
    flops = sum(2 * a[0] * a[1] * b[1] for a, b in products)
    assert flops == 6 * 5 * H * I


def test_empty_expert_has_exactly_zero_gradient():
    tensors = case([4, 0, 2])
    fused_experts(*tensors).sum().backward()
    assert tensors[2].grad[1].count_nonzero() == 0 and tensors[3].grad[1].count_nonzero() == 0


def test_weights_of_experts_without_rows_do_not_leak():
    x, offsets, gate_up, down, weight = case([4, 0, 2])
    with torch.no_grad():
        gate_up[1], down[1] = float("nan"), float("nan")
    y = fused_experts(x, offsets, gate_up, down, weight)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all() and weight.grad.isfinite().all()


def test_every_output_is_written():
    """With deterministic algorithms torch fills fresh memory with NaN, so a forgotten row shows."""
    torch.use_deterministic_algorithms(True)
    try:
        x, offsets, gate_up, down, weight = case([4, 0, 2])
        with torch.no_grad():
            more: Any = torch.cat([x, torch.full((2, H), float("nan"))]).requires_grad_()
        weights: Any = torch.cat([weight.detach(), torch.ones(2)]).requires_grad_()
        y = fused_experts(more, offsets, gate_up, down, weights)
        y.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    for tensor in (y, more.grad, gate_up.grad, down.grad, weights.grad):
        assert tensor.isfinite().all()
    assert (
        y[6:].count_nonzero() == 0
        and more.grad[6:].count_nonzero() == 0
        and weights.grad[6:].count_nonzero() == 0
    )


def test_expanded_and_strided_tensors():
    x, offsets, gate_up, down, weight = case([4, 0, 2])
    plain = gradients(
        fused_experts, (x, offsets, gate_up, down, weight), torch.ones(6, H, dtype=torch.float64)
    )
    strided_x = torch.randn(H, 6, dtype=torch.float64).t()
    strided_down = down.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    with torch.no_grad():
        strided_x.copy_(x)
    strided = (strided_x.requires_grad_(), offsets, gate_up, strided_down, weight)
    grad = torch.ones(1, 1, dtype=torch.float64).expand(6, H)
    torch.testing.assert_close(gradients(fused_experts, strided, grad), plain)
    torch.testing.assert_close(
        gradients(fused_experts, strided, torch.ones(H, 6, dtype=torch.float64).t()), plain
    )


def test_saves_only_the_input_and_the_preactivations():
    tensors = case([30, 0, 34], dtype=torch.float32)
    owned = {tensor.data_ptr() for tensor in tensors}
    saved = []

    def pack(tensor):
        if tensor.data_ptr() not in owned:
            saved.append(tensor.numel() * tensor.element_size())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        fused_experts(*tensors)
    assert sum(saved) == 64 * 2 * I * 4


def test_keeps_nothing_without_a_backward():
    tensors = case([3, 2], dtype=torch.float32)
    with torch.no_grad():
        y = fused_experts(*tensors)
    assert y.grad_fn is None
    with torch.inference_mode():
        torch.testing.assert_close(fused_experts(*tensors), y)


def test_stacked_weights_are_not_indexed_under_autograd():
    y = fused_experts(*case([3, 0, 2]))
    seen, stack = [], [y.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None:
            seen.append(type(node).__name__)
            stack += [parent for parent, _ in node.next_functions]
    assert not [name for name in seen if "Select" in name or "Index" in name]


def test_two_backwards_add_up():
    tensors = case([3, 2])
    fused_experts(*tensors).sum().backward()
    once = tensors[2].grad.clone()
    fused_experts(*tensors).sum().backward()
    torch.testing.assert_close(tensors[2].grad, 2 * once)


def test_two_runs_are_bitwise_equal():
    tensors = case([30, 0, 34], dtype=torch.float32, hidden=64, inner=96)
    grad = torch.randn(64, 64)
    for one, two in zip(
        gradients(fused_experts, tensors, grad), gradients(fused_experts, tensors, grad), strict=True
    ):
        assert torch.equal(one, two)


def test_float32_error_is_that_of_the_plain_loop():
    tensors = case([30, 0, 34], dtype=torch.float64, hidden=48, inner=80)
    grad = torch.randn(64, 48, dtype=torch.float64)
    exact = gradients(swiglu_experts_reference, tensors, grad)
    narrow = [t.detach().float().requires_grad_() if t.is_floating_point() else t for t in tensors]
    ours = gradients(fused_experts, narrow, grad.float())
    plain = gradients(swiglu_experts_reference, narrow, grad.float())
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert (a - c).abs().max() <= 2 * (b - c).abs().max()


def test_autocast_runs_in_its_dtype():
    x, offsets, gate_up, down, weight = case([3, 2], dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fused_experts(x, offsets, gate_up, down, weight)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert gate_up.grad.dtype == torch.float32
    torch.testing.assert_close(
        y.float(), fused_experts(x, offsets, gate_up, down, weight), rtol=0.05, atol=1.0
    )


@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize("counts", [[30, 0, 34], [1, 2, 4]])
def test_bfloat16_is_no_less_exact_than_a_loop_in_bfloat16(counts, has, monkeypatch):
    """With instructions for it, and computed in float32 without; few rows are computed as they are stored."""
    monkeypatch.setattr(arguments, "_has", lambda dtype: has)
    tensors = case(counts, dtype=torch.float64, hidden=48, inner=80)
    narrow = [t.detach().bfloat16().requires_grad_() if t.is_floating_point() else t for t in tensors]
    exact = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in narrow]
    grad = torch.randn(sum(counts), 48).bfloat16()
    ours, plain = (gradients(f, narrow, grad) for f in (fused_experts, swiglu_experts_reference))
    for a, b, c in zip(ours, plain, gradients(swiglu_experts_reference, exact, grad.double()), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - c).abs().max() <= 1.5 * (b - c).abs().max()


def test_graph_is_freed_after_backward():
    tensors = case([3, 2])
    y = fused_experts(*tensors)
    node = weakref.ref(y.grad_fn)
    y.sum().backward()
    del y
    assert node() is None
    assert os.environ["UNIMOE_KERNELS"] == "cpu"
