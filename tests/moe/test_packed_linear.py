import pytest
import torch
from torch import nn

from unimoe.model.utils import count_parameters
from unimoe.moe import MoELayer, SwiGLUExperts, TopK
from unimoe.moe.experts.packed import PackedExperts
from unimoe.moe.packed_linear import PackedEmbedding, PackedLinear


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_an_embedding_reads_the_rows_of_a_packed_head(bits):
    head = PackedLinear.from_linear(nn.Linear(24, 50, bias=False), bits, 8)
    embedding, ids = PackedEmbedding(head), torch.randint(0, 50, (2, 7))
    assert torch.equal(embedding(ids), head.weight[ids]) and not list(embedding.state_dict())
    assert embedding.bfloat16()(ids).dtype == torch.bfloat16


def test_linear_layers_in_other_dtypes():
    linear = nn.Linear(32, 20)
    packed = PackedLinear.from_linear(linear, 8, 32)
    x = torch.randn(3, 32)
    with torch.no_grad():
        assert (packed(x) - linear(x)).abs().max() < 2e-2 * linear(x).abs().max()
        assert packed.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_packed_weights_are_counted_as_weights():
    layer = MoELayer(TopK(32, 4, 2), SwiGLUExperts(4, 32, 48))
    model = nn.Sequential(nn.Linear(32, 32), layer)
    whole = count_parameters(model)
    layer.experts = PackedExperts.from_experts(layer.experts, [4, 2, 8, 3], 16)
    model[0] = PackedLinear.from_linear(model[0], 8, 16)
    assert count_parameters(model) == whole
