import pytest
import torch

from unimoe.errors import UserError
from unimoe.moe.adapt import PROJECTIONS, adapt


def test_every_projection_of_every_block_is_wrapped_and_a_new_bank_changes_nothing(decoder):
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


def test_targets_and_layers_are_chosen(decoder):
    assert list(adapt(decoder(), ["v_proj"], [1])) == ["layers.1.self_attn.v_proj"]
    assert len(adapt(decoder(), ["*.mlp.*"])) == 6
    with pytest.raises(UserError, match="named 'w1'; there are down_proj"):
        adapt(decoder(), ["w1"])


def test_fused_layers_stand_for_theirs(decoder):
    model = decoder()
    for block in model.layers:
        hidden, inner = block.mlp.up_proj.in_features, block.mlp.up_proj.out_features
        block.mlp.gate_up_proj = torch.nn.Linear(hidden, 2 * inner, bias=False)
        del block.mlp.gate_proj, block.mlp.up_proj
    names = [name.rpartition(".")[2] for name in adapt(model)]
    assert names.count("gate_up_proj") == 2 and len(names) == 2 * (len(PROJECTIONS) - 1)
