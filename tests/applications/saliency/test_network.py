import pytest
import torch
from torch import nn
from torch.testing import assert_close

from unimoe.applications.saliency.network import NetworkConfig, SaliencyNet
from unimoe.errors import UserError
from unimoe.moe import record
from unimoe.moe.install import moe_layers


def make(design: str = "psod", side: int = 16, **settings) -> SaliencyNet:
    torch.manual_seed(0)
    return SaliencyNet(NetworkConfig(design, **{"width": 16, "depth": 2, "heads": 2, **settings}), side)


def inputs(count: int = 3, side: int = 16):
    return torch.randn(count, 3, side, side), (torch.rand(count, side, side) > 0.5).float()


def test_shapes():
    model, (images, masks_BSS) = make(queries=4), inputs()
    assert model.masks(images).shape == (3, 4, 16, 16)
    scores_B = model.scores(images, masks_BSS)
    assert scores_B.shape == (3,) and (scores_B > 0).all() and (scores_B < 1).all()
    assert_close(model.masks(images[:1]), model.masks(images)[:1])
    assert not torch.allclose(scores_B, model.scores(images, 1 - masks_BSS))


def test_each_task_has_its_own_experts():
    """Those of the other task neither see tokens nor get gradients; attention learns from both."""
    model, (images, masks_BSS) = make(), inputs()
    for task, output in enumerate((model.masks(images).sum(), model.scores(images, masks_BSS).sum())):
        model.zero_grad()
        output.backward()
        for layer in moe_layers(model).values():
            for weight in layer.experts.parameters():
                assert weight.grad[task].any() and not weight.grad[1 - task].any()
        assert all(block.qkv.weight.grad.any() for block in model.blocks)
    with record() as records:
        model.masks(images)
        model.scores(images, masks_BSS)
    assert [one.routing.chosen().all(dim=0).tolist() for one in records] == [[True, False]] * 2 + [
        [False, True]
    ] * 2


def test_equal_experts_are_the_dense_model():
    model, dense, (images, masks_BSS) = make(), make("dense"), inputs()
    other = {name: value for name, value in dense.state_dict().items() if ".ffn." not in name}
    missing, unexpected = model.load_state_dict(other, strict=False)
    assert not unexpected and all(".ffn." in name for name in missing)
    with torch.no_grad():
        for layer, block in zip(moe_layers(model).values(), dense.blocks, strict=True):
            for name in ("up", "down"):
                linear = getattr(block.ffn, f"{name}_proj")
                getattr(layer.experts, f"{name}_proj").copy_(linear.weight)
                getattr(layer.experts, f"{name}_bias").copy_(linear.bias)
    model, dense = model.double(), dense.double()
    images, masks_BSS = images.double(), masks_BSS.double()
    assert_close(model.masks(images), dense.masks(images), rtol=0, atol=1e-9)
    assert_close(model.scores(images, masks_BSS), dense.scores(images, masks_BSS), rtol=0, atol=1e-9)


@pytest.mark.parametrize("design", ["psod", "switch"])
def test_active_parameters_are_those_of_the_dense_model(design):
    dense, model = make("dense"), make(design)
    idle = 0
    for layer in moe_layers(model).values():
        idle += sum(p.numel() for p in layer.experts.parameters())
        idle -= layer.experts.active_parameters(layer.experts_per_token)
        idle += sum(p.numel() for p in layer.router.parameters())
    assert sum(p.numel() for p in model.parameters()) - idle == sum(p.numel() for p in dense.parameters())


def test_masks_are_where_the_image_changes():
    """With blocks that do nothing, a pixel's mask depends on its surroundings alone."""
    model, (images, _) = make(side=64), inputs(1, side=64)
    for block in model.blocks:
        nn.init.zeros_(block.out.weight)
        nn.init.zeros_(block.out.bias)
        for weight in block.ffn.experts.parameters():
            nn.init.zeros_(weight)
    for step in model.stem.steps:
        step[1] = nn.Identity()  # a normalisation over all pixels
    changed = images.clone()
    changed[..., :2, :2] += 1
    moved = (model.masks(changed) - model.masks(images)).abs().amax(dim=(0, 1)) > 1e-6
    assert moved[:2, :2].any() and not moved[:, 40:].any() and not moved[40:].any()


@pytest.mark.parametrize("wrong", [{"heads": 3}, {"queries": 0}, {"ffn": 0.0}, {"width": 18}])
def test_mistakes_are_errors(wrong):
    with pytest.raises(UserError, match="model.network"):
        make(**wrong)
