import copy

import pytest
import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralSparseMoeBlock

from unimoe.errors import UserError
from unimoe.kernels import few_rows as kernel
from unimoe.kernels.packed import quantize_rtn
from unimoe.moe import FFNExperts, MoELayer, SwiGLUExperts, TopK, record
from unimoe.moe.experts.packed import PackedExperts
from unimoe.moe.few_rows import FewRowsMoELayer, few_rows
from unimoe.moe.packed_linear import PackedLinear


def experts(act="silu"):
    return SwiGLUExperts(4, 32, 48, act, init_std=0.3)


def error(found, expected):
    return (found - expected).abs().max() / expected.abs().max()


def dequantized(packed):
    """The same experts with the weights that the codes stand for."""
    plain = SwiGLUExperts(packed.num_experts, packed.hidden_size, packed.intermediate_size, packed.act)
    for stack, weight in zip(packed.stacks(), (plain.gate_up_proj, plain.down_proj), strict=True):
        for e in range(packed.num_experts):
            weight.data[e] = stack.dequantize(e, packed.level)
    return plain


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_a_layer_computes_with_the_packed_weights(act, tokens):
    layer = MoELayer(TopK(32, 4, 2, init_std=0.5), PackedExperts.from_experts(experts(act), [8, 4, 3, 2], 16))
    plain, x = copy.copy(layer), torch.randn(1, tokens, 32)
    plain._modules = {**layer._modules, "experts": dequantized(layer.experts)}
    with torch.no_grad():
        y = layer(x)
        assert error(y, plain(x)) < 3e-2  # activations of 8 bits
        with few_rows(layer), record() as records:
            few = layer(x)
        assert error(few, y) < 2e-3
    assert len(records) == 1 and records[0].routing.num_tokens == tokens


def test_a_layer_of_few_rows_runs_in_one_operator(built):
    layer = MoELayer(TopK(32, 4, 2), PackedExperts.from_experts(experts(), 4, 16))
    with few_rows(layer):
        assert type(layer) is FewRowsMoELayer or not kernel.available()


def test_error_falls_with_the_bits():
    plain, x = experts(), torch.randn(20, 32)
    layer = MoELayer(TopK(32, 4, 2), plain)
    with torch.no_grad():
        exact, errors = layer(x), []
        for bits in (1, 2, 3, 4, 8):
            layer.experts = PackedExperts.from_experts(plain, bits, 16)
            errors.append(float((layer(x) - exact).norm() / exact.norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02 and errors[-2] < 0.2


def test_experts_of_transformers():
    config = MixtralConfig(hidden_size=32, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        exact = block(x)
        block.experts = PackedExperts.from_experts(block.experts, 8, 16)
        found = block(x)
        ids, weights = torch.tensor([[0, 4]]), torch.ones(1, 2)  # 4 is no expert
        alone = block.experts(x[0, :1], ids, weights)
        only = block.experts(x[0, :1], ids[:, :1], weights[:, :1])
    assert error(found, exact) < 3e-2 and torch.equal(alone, only)


def test_codes_from_elsewhere():
    plain = experts()
    codes = tuple(quantize_rtn(one, 4, 16) for one in (plain.gate_up_proj, plain.down_proj))
    given = PackedExperts.from_experts(plain, 4, 16, codes=codes)
    own = PackedExperts.from_experts(plain, 4, 16).state_dict()
    assert all(torch.equal(one, own[name]) for name, one in given.state_dict().items())


def test_nested_codes_are_read_in_fewer_bits():
    layer, x = MoELayer(TopK(32, 4, 2), experts()), torch.randn(20, 32)
    with torch.no_grad():
        exact, errors = layer(x), []
        layer.experts = PackedExperts.from_experts(layer.experts, 4, 16, nested=True)
        for layer.experts.level in (2, 3, 4, 0):
            errors.append(float((layer(x) - exact).norm() / exact.norm()))
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2] and errors[2] == errors[3] < 0.2


def test_state_dict_on_the_meta_device():
    module = nn.Sequential(
        PackedExperts.from_experts(experts(), [8, 4, 3, 2], 16, nested=True),
        PackedLinear.from_linear(nn.Linear(32, 20), 4, 16),
    )
    with torch.device("meta"):
        empty = nn.Sequential(
            PackedExperts(4, 32, 48, [8, 4, 3, 2], 16, nested=True), PackedLinear(32, 20, 4, 16)
        )
    assert all(one.is_meta for one in empty.state_dict().values())
    empty.load_state_dict(module.state_dict(), assign=True)
    x = torch.randn(3, 32)
    with torch.no_grad():
        assert torch.equal(empty[1](x), module[1](x))
        cast = copy.deepcopy(module).bfloat16()[1].float()  # codes and scales are not cast
        assert torch.equal(cast.weight, module[1].weight)


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(UserError, match="FFNExperts cannot be packed, expected SwiGLUExperts"):
        PackedExperts.from_experts(FFNExperts(2, 32, 32), 4, 16)
    with pytest.raises(UserError, match="got bits for 3 experts, expected 4"):
        PackedExperts.from_experts(experts(), [4, 4, 4], 16)
    odd = MixtralExperts(MixtralConfig(hidden_size=32, intermediate_size=48, num_local_experts=4))
    odd.is_transposed = True
    with pytest.raises(UserError, match="cannot be packed .is_transposed is True."):
        PackedExperts.from_experts(odd, 4, 16)
