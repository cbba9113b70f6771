from typing import Any

import pytest
import torch

from unimoe.errors import UserError
from unimoe.moe import LoRAExperts, MoELayer, SwiGLUExperts, TopK

H, I, E = 16, 24, 4  # noqa: E741


def trained() -> Any:
    lora = LoRAExperts(SwiGLUExperts(E, H, I, init_std=0.3), 3, 6.0)
    with torch.no_grad():
        for B in (lora.lora_B_gate_up, lora.lora_B_down):
            B.normal_(std=0.3)
    return lora


def layer(experts) -> Any:
    torch.manual_seed(5)
    return MoELayer(TopK(H, E, 2, init_std=0.5), experts)


def test_merged_experts_give_the_same_output():
    lora, x = trained(), torch.randn(30, H)
    merged = lora.merge()
    assert isinstance(merged, SwiGLUExperts) and merged.gate_up_proj.requires_grad
    torch.testing.assert_close(layer(merged)(x), layer(lora)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["cpu", "reference"])
def test_adapters_get_the_gradient_of_the_merged_weights(form, monkeypatch):
    """dL/dB = scale * dL/dW A^T, with dL/dW from the merged experts."""
    monkeypatch.setenv("UNIMOE_KERNELS", form)
    lora, x = trained(), torch.randn(30, H)
    merged = lora.merge()
    layer(merged)(x).square().sum().backward()
    layer(lora)(x).square().sum().backward()
    for name in ("gate_up", "down"):
        dW = getattr(merged, name + "_proj").grad
        A, B = getattr(lora, "lora_A_" + name), getattr(lora, "lora_B_" + name)
        torch.testing.assert_close(B.grad, 2 * dW @ A.detach().transpose(1, 2), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(A.grad, 2 * B.detach().transpose(1, 2) @ dW, rtol=1e-4, atol=1e-4)
    assert all(p.grad is None for p in lora.base.parameters())


def test_fresh_adapters_change_nothing():
    base, x = SwiGLUExperts(E, H, I, init_std=0.3), torch.randn(30, H)
    expected = layer(base)(x)
    assert torch.equal(layer(LoRAExperts(base, 2, 4.0))(x), expected)


def test_names_shapes_and_what_trains():
    lora = LoRAExperts(SwiGLUExperts(E, H, I), 3, 6.0)
    trainable = {name: tuple(p.shape) for name, p in lora.named_parameters() if p.requires_grad}
    assert trainable == {
        "lora_A_gate_up": (E, 3, H),
        "lora_B_gate_up": (E, 2 * I, 3),
        "lora_A_down": (E, 3, I),
        "lora_B_down": (E, H, 3),
    }
    assert "base.gate_up_proj" in lora.state_dict()
    assert lora.lora_B_down.count_nonzero() == 0 and lora.lora_A_down.abs().max() <= I**-0.5


def test_half_precision_base_keeps_float32_adapters():
    lora: Any = LoRAExperts(SwiGLUExperts(E, H, I).bfloat16(), 3, 6.0)
    assert lora.lora_A_down.dtype == torch.float32
    x = torch.randn(8, H, dtype=torch.bfloat16)
    y = layer(lora)(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert lora.lora_B_down.grad.dtype == torch.float32 and lora.merge().down_proj.dtype == torch.bfloat16


def test_mistakes_name_what_was_found():
    with pytest.raises(UserError, match="rank 0"):
        LoRAExperts(SwiGLUExperts(E, H, I), 0, 4.0)
