from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from unimoe.errors import UserError
from unimoe.moe import MoELayer, TopK, latent_experts

H, I = 16, 24  # noqa: E741


def mlp() -> Any:
    return LlamaMLP(LlamaConfig(hidden_size=H, intermediate_size=I, num_attention_heads=2)).double()


@pytest.mark.parametrize("slices", [1, 2])
def test_exact_a_latent_space_of_the_whole_size_is_the_dense_ffn(slices):
    dense, x = mlp(), torch.randn(30, H, dtype=torch.float64)
    experts = latent_experts([dense] * 4, slices, size=H)
    router = TopK(H, 4 * slices, slices, groups="slices", slices=slices, init_std=1.0)
    layer = MoELayer(router, experts, "straight_through")
    torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-9)


def test_exact_a_low_rank_ffn_needs_no_larger_space_than_its_rank():
    dense, x = mlp(), torch.randn(30, H, dtype=torch.float64)
    with torch.no_grad():
        into, out = (torch.linalg.qr(torch.randn(H, 5, dtype=torch.float64)).Q for _ in range(2))
        for linear in (dense.gate_proj, dense.up_proj):
            linear.weight.copy_(linear.weight @ into @ into.T)
        dense.down_proj.weight.copy_(out @ out.T @ dense.down_proj.weight)
    layer = MoELayer(TopK(H, 2, 1), latent_experts([dense] * 2, 1, size=5))
    torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-9)


def test_a_smaller_space_is_nearer_than_a_random_one_and_needs_training():
    dense, x = mlp(), torch.randn(200, H, dtype=torch.float64)
    layer = MoELayer(TopK(H, 2, 1), latent_experts([dense] * 2, 1, size=12))
    error = (layer(x) - dense(x)).norm() / dense(x).norm()
    assert 0.01 < error < 0.8


def test_a_quarter_is_the_default_and_it_builds_without_memory():
    with torch.device("meta"):
        experts: Any = latent_experts([mlp()] * 2, 2)
    assert experts.down.shape == (4, H) and experts.up.shape == (H, 4) and experts.down.is_meta
    assert experts.inner.gate_up_proj.shape == (4, I, 4) and experts.inner.down_proj.shape == (4, 4, I // 2)


def test_mistakes_name_what_was_found():
    with pytest.raises(UserError, match="size is 17, expected 1..16"):
        latent_experts([mlp()], 1, size=17)
