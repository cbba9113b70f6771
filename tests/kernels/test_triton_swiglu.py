"""Experts in Triton's interpreter, on a CPU; test_triton.py runs this file.

The interpreter takes 20 to 40 ms for a program, so everything is tiny: one tile holds the columns, except in
tests of how they are cut. It knows no bfloat16 product.
"""

import os
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from unimoe.kernels.swiglu import fused_experts, swiglu_experts_reference

pytest.importorskip("triton")

from unimoe.kernels import triton_swiglu
from unimoe.kernels.triton_routing import tile_bound

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton.py")

H, I = 12, 10  # noqa: E741
CUT = (24, 20)
"""H and I that take two tiles each, of which the second is not full."""
GROUPINGS = {
    "even": [3, 3, 3],
    "an empty expert, one over a tile": [17, 0, 2],
    "one takes all": [0, 16, 0],
    "a single row": [0, 0, 1],
    "no rows": [0, 0, 0],
}


SHIPPED = triton_swiglu.TILES


def case(counts, tokens=None, tail=0, dtype=torch.float32, sizes=(H, I)) -> Any:
    """Arguments of fused_experts, the tokens second where there are any; ``sizes`` are H and I."""
    E, N, (H, I) = len(counts), sum(counts) + tail, sizes  # noqa: E741
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    x = torch.randn(N if tokens is None else tokens, H)
    token = [] if tokens is None else [torch.randint(0, max(tokens, 1), (N,))]
    values = [torch.randn(E, 2 * I, H) / 4, torch.randn(E, H, I) / 4, torch.rand(N)]
    x, *values = (value.to(dtype).requires_grad_() for value in (x, *values))
    return [x, *token, offsets, *values]


def in_order(x, *rest):
    *token, offsets, gate_up, down, weight = rest
    return x, offsets, gate_up, down, weight, *token


def reference(*args):
    if len(args) == 5:
        return swiglu_experts_reference(*args)
    x, token, *others = args
    y = swiglu_experts_reference(x.index_select(0, token), *others)
    return torch.zeros_like(x).index_add(0, token, y)


def ours(*args):
    return triton_swiglu.fused_experts(*in_order(*args))


def leaves(args):
    return [arg for arg in args if arg is not None and arg.requires_grad]


def gradients(function, args, grad=None):
    y = function(*args)
    torch.manual_seed(1)
    grad = torch.randn(y.shape).to(y.dtype) if grad is None else grad
    return [y, *torch.autograd.grad(y, leaves(args), grad)]


@pytest.mark.parametrize("counts", GROUPINGS.values(), ids=GROUPINGS.keys())
@pytest.mark.parametrize("tokens", [None, 7])
def test_equals_the_reference_with_every_gradient(counts, tokens):
    args = case(counts, tokens, sizes=CUT)
    for one, other in zip(gradients(ours, args), gradients(reference, args), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh"])
def test_other_gates(act):
    args = case([3, 2])
    one, other = (
        gradients(lambda *args, form=form: form(*args, act=act), args)
        for form in (triton_swiglu.fused_experts, swiglu_experts_reference)
    )
    for ours, plain in zip(one, other, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_no_tokens():
    for one, other in zip(*(gradients(f, case([0, 0], tokens=0)) for f in (ours, reference)), strict=True):
        assert torch.equal(one, other)


def test_without_weights():
    args = case([3, 2])
    args[-1] = None
    for one, other in zip(gradients(ours, args), gradients(reference, args), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tiles", [tiles for (_, itemsize), tiles in SHIPPED.items() if itemsize == 4])
def test_the_shipped_tiles(tiles, monkeypatch):
    """They are larger than everything here."""
    monkeypatch.setattr(triton_swiglu, "TILES", {(None, 4): tiles})
    args = case([5, 2], tokens=4, sizes=CUT)
    for one, other in zip(gradients(ours, args), gradients(reference, args), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_tiles_follow_the_rows_per_expert(monkeypatch):
    monkeypatch.setattr(triton_swiglu, "TILES", SHIPPED)
    rows = [triton_swiglu.tiles_for(8 * n, 8, torch.bfloat16).rows.rows for n in (1, 16, 17, 128, 129)]
    assert rows == [16, 16, 64, 64, 128]
    assert all(tiles.gate_up.rows == tiles.rows.rows for tiles in SHIPPED.values())  # they share a map


def test_float16_error_is_that_of_the_plain_loop():
    args = case([17, 0, 9], tokens=9, dtype=torch.float16, sizes=CUT)
    wide = [arg.detach().double().requires_grad_() if arg.is_floating_point() else arg for arg in args]
    exact, plain = gradients(reference, wide), gradients(reference, args)
    for a, b, c in zip(gradients(ours, args), plain, exact, strict=True):
        assert (a - c).abs().max() <= 2 * (b - c).abs().max()


@pytest.mark.parametrize("trained", [1, 2, 4, 8, 9, 15])
def test_a_frozen_subset_does_no_work_for_its_gradients(trained, monkeypatch):
    args, made = case([3, 0, 2], tokens=4), []
    plain = triton_swiglu.weight_gradient
    monkeypatch.setattr(
        triton_swiglu, "weight_gradient", lambda *a, **kw: made.append(plain(*a, **kw)) or made[-1]
    )
    for bit, i in enumerate((0, 3, 4, 5)):
        args[i].requires_grad_(bool(trained >> bit & 1))
    for one, other in zip(gradients(ours, args), gradients(reference, args), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert len(made) == (trained >> 1 & 1) + (trained >> 2 & 1)


@pytest.mark.parametrize("tokens", [None, 4])
def test_everything_is_written_and_nothing_leaks(tokens):
    """Fresh memory, rows of nobody and the weights of an unused expert hold NaN."""
    args = case([4, 0, 2], tokens, tail=2, sizes=CUT)
    with torch.no_grad():
        args[-3][1], args[-2][1], args[-1][6:] = float("nan"), float("nan"), float("nan")
        if tokens is None:
            args[0][6:] = float("nan")
    torch.use_deterministic_algorithms(True)  # torch then fills fresh memory with NaN
    try:
        y, dx, d_gate_up, d_down, d_weight = gradients(ours, args)
    finally:
        torch.use_deterministic_algorithms(False)
    for tensor in (y, dx, d_gate_up, d_down, d_weight):
        assert tensor.isfinite().all()
    assert d_gate_up[1].count_nonzero() == d_down[1].count_nonzero() == d_weight[6:].count_nonzero() == 0
    if tokens is None:
        assert y[6:].count_nonzero() == dx[6:].count_nonzero() == 0


def test_gate_weight_of_zero_has_the_right_gradient():
    args = case([2, 2], tokens=3)
    with torch.no_grad():
        args[-1].zero_()
    d_weight = gradients(ours, args)[-1]
    torch.testing.assert_close(d_weight, gradients(reference, args)[-1], rtol=1e-4, atol=1e-4)
    assert d_weight.abs().min() > 0


def test_expanded_and_strided_tensors():
    args = case([4, 0, 2], sizes=CUT)
    grad = torch.ones(1, 1).expand(6, CUT[0])
    plain = gradients(reference, args, torch.ones(6, CUT[0]))
    for i in (0, 2, 3, 4):
        reversed_ = torch.empty(args[i].shape[::-1]).permute(*range(args[i].dim() - 1, -1, -1))
        args[i] = reversed_.copy_(args[i].detach()).requires_grad_()
    for one, other in zip(gradients(ours, args, grad), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_two_runs_are_bitwise_equal():
    args = case([17, 0, 9], tokens=9)
    for one, two in zip(gradients(ours, args), gradients(ours, args), strict=True):
        assert torch.equal(one, two)


def test_saves_only_the_input_the_preactivations_and_the_routing():
    args = case([6, 0, 4], tokens=5)
    owned, saved = {arg.data_ptr() for arg in args}, {torch.float32: 0, torch.int32: 0, torch.int64: 0}

    def pack(tensor):
        if tensor.data_ptr() not in owned:
            saved[tensor.dtype] += tensor.numel()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        ours(*args)
    assert saved == {torch.float32: 10 * 2 * I, torch.int64: 10, torch.int32: 3 * tile_bound(10, 3, 16) + 6}
    with torch.no_grad():
        assert ours(*args).grad_fn is None


def test_compiles_in_one_graph():
    args = case([3, 0, 2], tokens=4)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for one, other in zip(gradients(compiled, args), gradients(ours, args), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("tokens, weighted", [(4, True), (None, False)])
def test_the_custom_ops_keep_their_contract(tokens, weighted):
    x, *token, offsets, gate_up, down, weight = (arg.detach() for arg in case([3, 0, 2], tokens))
    token, weight = token[0] if token else None, weight if weighted else None
    checks = ("test_schema", "test_faketensor")
    forward = (x, token, offsets, gate_up, down, weight, True, "silu")
    torch.library.opcheck(triton_swiglu._forward, forward, test_utils=checks)
    y, h, *routing = triton_swiglu._forward(*forward)
    backward = (
        y,
        x,
        gate_up,
        down,
        weight,
        h,
        token,
        offsets,
        *routing,
        [True, False, True, weighted],
        "silu",
    )
    torch.library.opcheck(triton_swiglu._backward, backward, test_utils=checks)


def test_the_dispatcher_gets_here(monkeypatch):
    args = case([3, 0, 2], tokens=4)
    monkeypatch.setenv("UNIMOE_KERNELS", "triton")
    y = fused_experts(*in_order(*args))
    assert torch.equal(y, ours(*args))
    monkeypatch.setenv("UNIMOE_KERNELS", "cpu")
    torch.testing.assert_close(y, fused_experts(*in_order(*args)), rtol=1e-4, atol=1e-4)
