from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from unimoe.errors import UserError
from unimoe.moe import MoELayer, TopK, subspace_experts

D, B = 16, 24


def mlp() -> Any:
    return LlamaMLP(LlamaConfig(hidden_size=D, intermediate_size=B, num_attention_heads=2)).double()


def test_exact_one_expert_is_the_ffn_times_its_influence():
    dense, x = mlp(), torch.randn(20, D, dtype=torch.float64)
    layer = MoELayer(TopK(D, 1, 1), subspace_experts([dense], 1))
    with torch.no_grad():
        layer.experts.topology = torch.nn.Parameter(layer.experts.topology.double())
    expected = torch.tensor(1.0, dtype=torch.float64).sigmoid() * dense(x)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-9)


def test_copies_and_slices_are_experts_of_one_ffn():
    dense = mlp()
    experts = subspace_experts([dense] * 2, 2)
    assert experts.num_experts == 4 and experts.size == B // 2
    assert torch.equal(experts.gate_up_proj[1], dense.up_proj.weight)
    assert experts.topology.diagonal().eq(1).all() and 0 < experts.topology[0, 1] < 0.3


def test_other_ffns_are_refused():
    with pytest.raises(UserError, match="subspace experts share one FFN, that of expert 1 is another"):
        subspace_experts([mlp(), mlp()], 1)
