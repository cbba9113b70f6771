import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from unimoe.errors import UserError
from unimoe.moe.adapt import PROJECTIONS, adapt


def decoder(layers=2, hidden=16):
    torch.manual_seed(0)
    return LlamaModel(
        LlamaConfig(
            vocab_size=32,
            hidden_size=hidden,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
        )
    )


def test_every_projection_of_every_block_is_wrapped_and_a_new_bank_changes_nothing():
    model = decoder()
    ids = torch.arange(10)[None]
    before = model(ids).last_hidden_state
    layers = adapt(model)
    assert len(layers) == 2 * len(PROJECTIONS)
    for layer in layers.values():
        layer.add_bank(4, 2)
    assert torch.equal(model(ids).last_hidden_state, before)
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"A", "B"}


def test_targets_and_layers_are_chosen():
    assert list(adapt(decoder(), ["v_proj"], [1])) == ["layers.1.self_attn.v_proj"]
    assert len(adapt(decoder(), ["*.mlp.*"])) == 6
    with pytest.raises(UserError, match="named 'w1'; there are down_proj"):
        adapt(decoder(), ["w1"])
