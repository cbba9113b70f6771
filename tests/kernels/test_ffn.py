from typing import Any

import pytest
import torch
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks

from unimoe.errors import UserError
from unimoe.kernels.ffn import ffn_experts_reference, fused_ffn_experts

H, I = 6, 10  # noqa: E741
COUNTS = [[3, 3, 3], [4, 0, 2], [0, 6, 0], [0, 0, 1], [0, 0, 0], [5]]
pytestmark = pytest.mark.usefixtures("loop")


def case(counts, dtype=torch.float64, rest=0) -> Any:
    """What ``fused_ffn_experts`` takes, without the activation; ``rest`` rows belong to nobody."""
    E, N = len(counts), sum(counts)
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    shapes = [(E, I, H), (E, I), (E, H, I), (E, H), (N + rest,)]
    x, *stacks, weight = (
        torch.randn(shape, dtype=dtype, requires_grad=True) for shape in [(N + rest, H), *shapes]
    )
    return x, offsets, *stacks, weight


def gradients(function, case, act, grad):
    *tensors, weight = case
    y = function(*tensors, act=act, weight_N=weight)
    leaves = [one for one in case if one is not None and one.requires_grad]
    return [y, *torch.autograd.grad(y, leaves, grad)]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("rest", [0, 2])
def test_equals_the_reference_with_every_gradient(counts, act, rest):
    tensors = case(counts, rest=rest)
    grad = torch.randn(1, H, dtype=torch.float64).expand(sum(counts) + rest, H)
    ours, plain = (gradients(f, tensors, act, grad) for f in (fused_ffn_experts, ffn_experts_reference))
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_gradcheck(act):
    x, offsets, *stacks, weight = case([2, 0, 1])
    assert gradcheck(
        lambda x, w, *s: fused_ffn_experts(x, offsets, *s, act=act, weight_N=w), (x, weight, *stacks)
    )


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_the_fused_sum_has_the_gradients_of_gather_and_sum(act):
    x, offsets, *stacks, weight = case([3, 0, 2])
    token, tokens = torch.tensor([0, 2, 3, 0, 2]), torch.randn(4, H, dtype=torch.float64, requires_grad=True)
    leaves, grad = [tokens, *stacks, weight], torch.randn(4, H, dtype=torch.float64)
    plain = ffn_experts_reference(tokens[token], offsets, *stacks, act=act, weight_N=weight)
    plain = torch.zeros_like(tokens).index_add(0, token, plain)
    ours = fused_ffn_experts(tokens, offsets, *stacks, act=act, weight_N=weight, token_N=token)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(plain, leaves, grad)
    )


def test_is_the_dense_ffn_for_each_token():
    x, offsets, *stacks, weight = case([2, 3])
    token, up, up_b, down, down_b = torch.tensor([0, 2, 0, 1, 2]), *stacks
    y = fused_ffn_experts(x[:4], offsets, *stacks, act="relu", weight_N=weight, token_N=token)
    plain = torch.zeros(4, H, dtype=torch.float64)
    for n, (t, e) in enumerate(zip(token.tolist(), [0, 0, 1, 1, 1], strict=True)):
        plain[t] += weight[n] * (down[e] @ (up[e] @ x[t] + up_b[e]).relu() + down_b[e])
    torch.testing.assert_close(y, plain)
    assert y[3].count_nonzero() == 0


@pytest.mark.parametrize("trained", range(1, 64))
def test_every_frozen_subset(trained):
    tensors = case([3, 0, 2])
    for bit, i in enumerate((0, 2, 3, 4, 5, 6)):
        tensors[i].requires_grad_(bool(trained >> bit & 1))
    grad = torch.randn(5, H, dtype=torch.float64)
    ours, plain = (gradients(f, tensors, "gelu", grad) for f in (fused_ffn_experts, ffn_experts_reference))
    torch.testing.assert_close(ours, plain)


def test_experts_without_rows_get_zeros_and_do_not_leak():
    x, offsets, *stacks, weight = case([4, 0, 2])
    with torch.no_grad():
        for stack in stacks:
            stack[1] = float("nan")
    y = fused_ffn_experts(x, offsets, *stacks, act="relu", weight_N=weight)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(stack.grad[1].count_nonzero() == 0 for stack in stacks)


def test_saves_only_the_input_and_the_preactivations():
    tensors = case([30, 0, 34], torch.float32)
    owned, saved = {tensor.data_ptr() for tensor in tensors}, []

    def pack(tensor):
        if tensor.data_ptr() not in owned:
            saved.append(tensor.numel() * tensor.element_size())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        fused_ffn_experts(*tensors[:-1], act="relu", weight_N=tensors[-1])
    assert sum(saved) == 64 * I * 4


def test_unknown_activation_is_a_user_error():
    *tensors, weight = case([1, 1])
    with pytest.raises(UserError, match="activation 'tanh', expected one of relu, gelu"):
        fused_ffn_experts(*tensors, act="tanh", weight_N=weight)
