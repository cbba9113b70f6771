from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from unimoe.errors import UserError
from unimoe.moe import LoRAExperts, MoELayer, SwiGLUExperts, TopK, copy_experts

H, I, E = 16, 24, 4  # noqa: E741


def mlp():
    return LlamaMLP(LlamaConfig(hidden_size=H, intermediate_size=I, num_attention_heads=4))


def bases():
    return [SwiGLUExperts(E, H, I, init_std=0.3), mlp()]


def trained(base, rank=3, alpha=6.0) -> Any:
    lora = LoRAExperts(base, E, rank, alpha)
    with torch.no_grad():
        for B in (lora.lora_B_gate_up, lora.lora_B_down):
            B.normal_(std=0.3)
    return lora


def layer(experts) -> Any:
    torch.manual_seed(5)
    return MoELayer(TopK(H, E, 2, init_std=0.5), experts)


@pytest.mark.parametrize("base", bases(), ids=["own", "shared"])
def test_merged_experts_give_the_same_output(base):
    lora, x = trained(base), torch.randn(30, H)
    merged = lora.merge()
    assert isinstance(merged, SwiGLUExperts) and merged.gate_up_proj.requires_grad
    torch.testing.assert_close(layer(merged)(x), layer(lora)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", bases(), ids=["own", "shared"])
@pytest.mark.parametrize("form", ["cpu", "reference"])
def test_adapters_get_the_gradient_of_the_merged_weights(base, form, monkeypatch):
    """dL/dB = scale * dL/dW A^T, with dL/dW from the merged experts."""
    monkeypatch.setenv("UNIMOE_KERNELS", form)
    lora, x = trained(base), torch.randn(30, H)
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
    assert torch.equal(layer(LoRAExperts(base, E, 2, 4.0))(x), expected)
    dense = mlp()
    torch.testing.assert_close(layer(LoRAExperts(dense, E, 2, 4.0))(x), dense(x), rtol=1e-5, atol=1e-6)


def test_shared_base_equals_copies_of_it_as_own_bases():
    dense, x = mlp(), torch.randn(30, H)
    shared, own = trained(dense), LoRAExperts(copy_experts(dense, E), E, 3, 6.0)
    own.load_state_dict({k: v for k, v in shared.state_dict().items() if "lora" in k}, strict=False)
    torch.testing.assert_close(layer(shared)(x), layer(own)(x), rtol=1e-5, atol=1e-5)
    # rows that are already gathered give the same as well
    offsets = torch.tensor([0, 5, 5, 20, 30])
    torch.testing.assert_close(shared(x, offsets), own(x, offsets), rtol=1e-5, atol=1e-5)


def test_names_shapes_and_what_trains():
    lora = LoRAExperts(SwiGLUExperts(E, H, I), E, 3, 6.0)
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
    lora: Any = LoRAExperts(SwiGLUExperts(E, H, I).bfloat16(), E, 3, 6.0)
    assert lora.lora_A_down.dtype == torch.float32
    x = torch.randn(8, H, dtype=torch.bfloat16)
    y = layer(lora)(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert lora.lora_B_down.grad.dtype == torch.float32 and lora.merge().down_proj.dtype == torch.bfloat16


def test_mistakes_name_what_was_found():
    with pytest.raises(UserError, match="LoRA for 4 experts on a base of 3"):
        LoRAExperts(SwiGLUExperts(3, H, I), 4, 2, 4.0)
    with pytest.raises(UserError, match="rank 0"):
        LoRAExperts(mlp(), 4, 0, 4.0)
    with pytest.raises(UserError, match="Linear is not a SwiGLU FFN"):
        LoRAExperts(torch.nn.Linear(2, 2), 4, 2, 4.0)
