from typing import Any

import pytest
import torch
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks

from unimoe.kernels.lora import Adapters, fused_lora_experts, lora_experts_reference

pytestmark = pytest.mark.usefixtures("loop")
R, H, I = 2, 6, 10  # noqa: E741
COUNTS = [[3, 3, 3], [4, 0, 2], [0, 6, 0], [0, 0, 1], [0, 0, 0]]


def adapters(E, dtype=torch.float64):
    shapes = [(E, R, H), (E, 2 * I, R), (E, R, I), (E, H, R)]
    return Adapters(*(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes))


def case(counts, dtype=torch.float64) -> Any:
    E, N = len(counts), sum(counts)
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    x = torch.randn(N, H, dtype=dtype, requires_grad=True)
    gate_up = torch.randn(E, 2 * I, H, dtype=dtype, requires_grad=True)
    down = torch.randn(E, H, I, dtype=dtype, requires_grad=True)
    weight = torch.rand(N, dtype=dtype, requires_grad=True)
    return x, offsets, gate_up, down, adapters(E, dtype), 0.5, weight


def leaves(tensors):
    flat = []
    for tensor in tensors:
        flat += list(tensor) if isinstance(tensor, Adapters) else [tensor]
    return [one for one in flat if isinstance(one, torch.Tensor) and one.requires_grad]


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh"])
def test_other_gates_have_the_gradients_of_the_reference(act):
    tensors = case([3, 0, 2])
    ours, plain = (f(*tensors, act=act) for f in (fused_lora_experts, lora_experts_reference))
    torch.testing.assert_close(ours, plain)
    grads = [torch.autograd.grad(y.square().sum(), leaves(tensors)) for y in (ours, plain)]
    torch.testing.assert_close(*grads)


def run(function, tensors, form, monkeypatch):
    monkeypatch.setenv("UNIMOE_KERNELS", form)
    y = function(*tensors)
    torch.manual_seed(1)
    return [y, *torch.autograd.grad(y, leaves(tensors), torch.randn_like(y), allow_unused=True)]


@pytest.mark.parametrize("counts", COUNTS)
def test_per_expert_equals_the_reference(counts, monkeypatch):
    tensors = case(counts)
    ours, plain = (run(fused_lora_experts, tensors, form, monkeypatch) for form in ("cpu", "reference"))
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_gradcheck(monkeypatch):
    monkeypatch.setenv("UNIMOE_KERNELS", "cpu")
    x, offsets, gate_up, down, lora, scale, weight = case([2, 0, 1])
    assert gradcheck(
        lambda x, g, d, w, *ab: fused_lora_experts(x, offsets, g, d, Adapters(*ab), scale, w),
        (x, gate_up, down, weight, *lora),
    )


@pytest.mark.parametrize("trained", range(6))
def test_frozen_subsets(trained, monkeypatch):
    """Only x, only the weight, only the adapters, all but the base, only B, some."""
    tensors = case([3, 0, 2])
    lora = next(one for one in tensors if isinstance(one, Adapters))
    x, weight = tensors[0], tensors[-1]
    keep = [[x], [weight], [*lora], [x, weight, *lora], [lora.B_gate_up, lora.B_down], [weight, lora.A_down]][
        trained
    ]
    for leaf in leaves(tensors):
        leaf.requires_grad_(any(leaf is one for one in keep))
    ours, plain = (run(fused_lora_experts, tensors, form, monkeypatch) for form in ("cpu", "reference"))
    torch.testing.assert_close(ours, plain)


def test_a_zero_B_is_the_base_to_the_last_bit(monkeypatch):
    from unimoe.kernels.swiglu import fused_experts

    monkeypatch.setenv("UNIMOE_KERNELS", "cpu")
    x, offsets, gate_up, down, lora, scale, weight = case([3, 0, 2], torch.float32)
    with torch.no_grad():
        lora.B_gate_up.zero_()
        lora.B_down.zero_()
    adapted = fused_lora_experts(x, offsets, gate_up, down, lora, scale, weight)
    assert torch.equal(adapted, fused_experts(x, offsets, gate_up, down, weight))


@pytest.mark.parametrize("form", ["cpu", "reference"])
def test_with_tokens_it_gathers_and_sums(form, monkeypatch):
    monkeypatch.setenv("UNIMOE_KERNELS", form)
    x, offsets, gate_up, down, lora, scale, weight = case([3, 0, 2])
    token, tokens = torch.tensor([0, 2, 3, 0, 2]), x[:4]
    rest = (offsets, gate_up, down, lora, scale, weight)
    y = torch.zeros_like(tokens).index_add(0, token, fused_lora_experts(tokens[token], *rest))
    torch.testing.assert_close(fused_lora_experts(tokens, *rest, token_N=token), y)


def test_equals_merged_weights(monkeypatch):
    x, offsets, gate_up, down, lora, scale, weight = case([3, 0, 2])
    merged_gate_up = gate_up + scale * lora.B_gate_up @ lora.A_gate_up
    merged_down = down + scale * lora.B_down @ lora.A_down
    from unimoe.kernels.swiglu import swiglu_experts_reference

    merged = swiglu_experts_reference(x, offsets, merged_gate_up, merged_down, weight)
    torch.testing.assert_close(lora_experts_reference(x, offsets, gate_up, down, lora, scale, weight), merged)


def test_saved_bytes(monkeypatch):
    monkeypatch.setenv("UNIMOE_KERNELS", "cpu")
    tensors = case([30, 0, 34], torch.float32)
    owned = {one.data_ptr() for one in [*leaves(tensors), tensors[1]]}
    saved = []

    def pack(tensor):
        if tensor.data_ptr() not in owned:
            saved.append(tensor.numel() * tensor.element_size())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        fused_lora_experts(*tensors)
    assert sum(saved) == 64 * 2 * I * 4


def test_expanded_gradient(monkeypatch):
    monkeypatch.setenv("UNIMOE_KERNELS", "cpu")
    tensors = case([3, 0, 2])
    expanded = torch.autograd.grad(fused_lora_experts(*tensors).sum(), leaves(tensors))
    y = fused_lora_experts(*tensors)
    torch.testing.assert_close(expanded, torch.autograd.grad(y, leaves(tensors), torch.ones_like(y)))
