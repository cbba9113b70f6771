from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from unimoe.errors import UserError
from unimoe.moe import copy_experts, pooled_experts

H, I = 16, 24  # noqa: E741


def mlp() -> Any:
    return LlamaMLP(LlamaConfig(hidden_size=H, intermediate_size=I, num_attention_heads=2))


def test_exact_own_experts_are_copies_and_the_pool_adds_no_weights():
    dense = mlp()
    pooled, copies = pooled_experts([dense] * 3, 1, group=2), copy_experts(dense, 3)
    assert (pooled.num_experts, pooled.num_stored, copies.num_stored) == (6, 3, 3)
    assert pooled.state_dict().keys() == copies.state_dict().keys()
    assert torch.equal(pooled.gate_up_proj, copies.gate_up_proj)
    assert torch.equal(pooled.down_proj, copies.down_proj)


def test_it_builds_without_memory():
    with torch.device("meta"):
        experts = pooled_experts([mlp()] * 2, 2, group=4, positions=8)
    assert experts.down_proj.is_meta and experts.num_experts == 16 and experts.num_stored == 4


def test_groups_that_do_not_fit():
    with pytest.raises(UserError, match="moe.experts.group is 4, expected a divisor of 6"):
        pooled_experts([mlp()], 1, group=4, positions=6)
