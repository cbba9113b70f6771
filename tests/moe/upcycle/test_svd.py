from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from unimoe.errors import UserError
from unimoe.moe import MoELayer, TopK, svd_experts

H, I = 16, 24  # noqa: E741


def mlp(rank: int | None = None) -> Any:
    dense = LlamaMLP(LlamaConfig(hidden_size=H, intermediate_size=I, num_attention_heads=2)).double()
    if rank is not None:
        with torch.no_grad():
            into = torch.linalg.qr(torch.randn(H, rank, dtype=torch.float64)).Q
            for linear in (dense.gate_proj, dense.up_proj):
                linear.weight.copy_(linear.weight @ into @ into.T)
    return dense


@pytest.mark.parametrize("slices, size, rank", [(1, H, None), (2, H, None), (1, 5, 5)])
def test_exact_a_size_of_the_rank_is_the_dense_ffn(slices, size, rank):
    dense, x = mlp(rank), torch.randn(30, H, dtype=torch.float64)
    router = TopK(H, 4 * slices, slices, groups="slices", slices=slices, init_std=1.0)
    layer = MoELayer(router, svd_experts([dense] * 4, slices, size), "straight_through")
    torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [4, 8, 12])
def test_exact_the_error_of_the_weights_is_the_tail_energy(size):
    """Of the singular values of the group's matrices, one above the other (Eckart-Young)."""
    dense = [mlp() for _ in range(4)]
    experts = svd_experts(dense, 1, size, group_size=2)
    for group in range(2):
        for part, name in enumerate(("gate_proj", "up_proj")):
            members = dense[2 * group : 2 * group + 2]
            stacked = torch.cat([getattr(one, name).weight.detach() for one in members])
            B_MD = experts.into[group].chunk(2)[part]
            A_RM = torch.cat([experts.out[2 * group + own].chunk(2)[part] for own in range(2)])
            tail = torch.linalg.svdvals(stacked)[size:].square().sum()
            torch.testing.assert_close((stacked - A_RM @ B_MD).square().sum(), tail, rtol=0, atol=1e-9)


def test_half_is_the_default_and_it_builds_without_memory():
    with torch.device("meta"):
        experts: Any = svd_experts([mlp()] * 8, 1)
    assert experts.into.shape == (2, H, H) and experts.into.is_meta
    assert experts.out.shape == (8, 2 * I, H // 2) and experts.down_proj.shape == (8, H, I)


def test_mistakes_name_what_was_found():
    with pytest.raises(UserError, match="size is 17, expected 1..16"):
        svd_experts([mlp()], 1, size=17)
    with pytest.raises(UserError, match="moe.experts.group_size is 3, expected a divisor of 4"):
        svd_experts([mlp()] * 4, 1, group_size=3)
