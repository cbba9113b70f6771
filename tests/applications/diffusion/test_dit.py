import pytest
import torch
from torch import nn
from torch.testing import assert_close

from unimoe.applications.diffusion.dit import FFN, DiT, DiTConfig
from unimoe.errors import UserError
from unimoe.moe import auxiliary_loss, record
from unimoe.moe.install import moe_layers

DATA = {"channels": 3, "side": 8, "classes": 3, "text": 0}
SMALL = {"width": 16, "depth": 4, "heads": 2}


def make(design: str = "dense", **settings) -> DiT:
    torch.manual_seed(0)
    data = {name: settings.pop(name, value) for name, value in DATA.items()}
    return DiT(DiTConfig(**{**SMALL, "design": design, **settings}), **data)


def inputs(count: int = 4):
    return torch.randn(count, 3, 8, 8), torch.rand(count), torch.arange(count) % 3


def moved(model: DiT) -> DiT:
    """With weights everywhere, as after training."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_a_fresh_model_predicts_zero_and_its_blocks_are_the_identity():
    model = make()
    assert not model(*inputs()).any()
    x_BND = torch.randn(2, 4, 16)
    assert model.blocks[0](x_BND, torch.randn(2, 16)).equal(x_BND)


def test_patches_come_back_where_they_were():
    """Each patch of the output is a function of its own token alone where blocks are the identity."""
    model = make(patch=4)
    nn.init.normal_(model.head.weight)
    x, time_B, label_B = inputs(1)
    changed = x.clone()
    changed[:, :, 4:, :4] += 1
    moved_BCSS = (model(changed, time_B, label_B) - model(x, time_B, label_B)).abs() > 1e-6
    assert (
        moved_BCSS[:, :, 4:, :4].any()
        and not moved_BCSS[:, :, :4].any()
        and not moved_BCSS[:, :, :, 4:].any()
    )


def test_switch_dit_starts_as_the_dense_model_bit_for_bit():
    dense, switch = moved(make()), make("switch_dit", ffn=4.0)
    missing, unexpected = switch.load_state_dict(dense.state_dict(), strict=False)
    assert not unexpected and all(".mask." in name for name in missing)
    batch = inputs()
    assert switch(*batch).equal(dense(*batch))


def test_promoe_is_in_every_other_block_and_sends_what_has_no_label_to_the_last_expert():
    model = moved(make("promoe", experts=5))
    assert list(moe_layers(model)) == [1, 3] and isinstance(model.blocks[0].ffn, FFN)
    x, time_B, label_B = inputs()
    with record() as records:
        model(x, time_B, torch.tensor([0, -1, 2, -1]))
    for one in records:
        last_BN = one.routing.chosen()[:, -1].reshape(4, -1)
        assert last_BN.all(dim=1).tolist() == [False, True, False, True] and not last_BN[[0, 2]].any()
    loss = auxiliary_loss(model.config.losses, records, moe_layers(model))
    loss.backward()
    assert moe_layers(model)[1].router.prototypes.grad.any()


@pytest.mark.parametrize("design", ["promoe", "switch_dit"])
def test_active_parameters_are_those_of_the_dense_model(design):
    """Of the experts that a token visits, routers and biases apart."""
    sizes = {"width": 64, "depth": 4}
    dense = sum(p.numel() for p in make(**sizes).parameters())
    model = make(design, **sizes)
    idle = 0
    for layer in moe_layers(model).values():
        experts = sum(p.numel() for p in layer.experts.parameters())
        idle += experts - layer.experts.active_parameters(layer.experts_per_token)
        idle += sum(p.numel() for p in layer.router.parameters())
    assert sum(p.numel() for p in model.parameters()) - idle == pytest.approx(dense, rel=0.01)


def test_a_text_takes_the_place_of_a_label():
    model = moved(make(classes=0, text=5))
    x, time_B, label_B = inputs()
    text_BX = torch.randn(4, 5)
    one, other = model(x, time_B, label_B, text_BX), model(x, time_B, label_B, text_BX[[1, 0, 2, 3]])
    assert not torch.allclose(one[:2], other[:2]) and one[2:].equal(other[2:])
    none = torch.full_like(label_B, -1)
    assert model(x, time_B, none, text_BX).equal(model(x, time_B, none, -text_BX))


def test_time_changes_the_prediction():
    model = moved(make())
    x, time_B, label_B = inputs()
    assert not torch.allclose(model(x, time_B, label_B), model(x, 1 - time_B, label_B))
    assert_close(model(x, time_B, label_B)[:1], model(x[:1], time_B[:1], label_B[:1]))


def test_a_design_has_sizes_of_its_own():
    switch, promoe = make("switch_dit").config, make("promoe", experts=5).config
    assert (switch.experts, switch.k, switch.ffn) == (3, 2, 3.0)
    assert (promoe.experts, promoe.k, promoe.ffn) == (5, 1, 4.0)
    assert make(side=12, patch=6).side == 12


@pytest.mark.parametrize(
    "wrong", [{"patch": 3}, {"heads": 3}, {"depth": 0}, {"design": "promoe", "experts": 2, "k": 3}]
)
def test_mistakes_are_errors(wrong):
    with pytest.raises(UserError, match="model.dit"):
        make(**wrong)


@pytest.mark.parametrize("condition", [{"classes": 0}, {"text": 4}])
def test_there_is_one_condition(condition):
    with pytest.raises(ValueError, match="a class or a text"):
        make(**condition)
