import pytest
import torch
from torch.testing import assert_close

from unimoe.applications.unified.adapt import adapt, important_units
from unimoe.applications.unified.network import SwiGLU, UnifiedNet, UnifiedNetConfig, prompts
from unimoe.moe.install import moe_layers

SMALL = {"patch": 2, "width": 16, "depth": 4, "heads": 2, "inner": 24, "experts": 4}


def make(design: str, k: int) -> UnifiedNet:
    config = UnifiedNetConfig(design, **SMALL, k=k)
    model = UnifiedNet(config, channels=3, side=8, classes=3).double()
    torch.nn.init.normal_(model.draw_head.weight)
    return model


def adaptation(design: str, k: int) -> tuple[UnifiedNet, UnifiedNet, tuple]:
    """A dense model, an adapted one, and inputs of drawing."""
    torch.manual_seed(0)
    dense, model = make("dense", k), make(design, k)
    x, time_B = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    batch = x, time_B, prompts(torch.arange(3))
    adapt(dense, model, lambda: dense.velocity(*batch))
    for layer in moe_layers(model).values():
        torch.nn.init.zeros_(layer.router.weight)
    return dense, model, batch


@pytest.mark.parametrize(("design", "k"), [("moe", 4), ("pruned", 4), ("dense", 2)])
def test_with_all_units_it_is_the_dense_model(design, k):
    dense, model, batch = adaptation(design, k)
    assert_close(model.velocity(*batch), dense.velocity(*batch), rtol=0, atol=1e-9)


@pytest.mark.parametrize("design", ["moe", "pruned"])
def test_answers_stay_as_they_are(design):
    dense, model, (x, _, text_BW) = adaptation(design, 2)
    assert model.answer(x, text_BW).equal(dense.answer(x, text_BW))


def test_experts_are_whole_units_of_equal_importance():
    dense, model, _ = adaptation("moe", 2)
    for index, layer in moe_layers(model).items():
        ffn = dense.blocks[index].draw.ffn
        gate_EID = layer.experts.gate_up_proj.chunk(2, dim=1)[0]
        place = {tuple(row.tolist()): unit for unit, row in enumerate(ffn.gate_proj.weight)}
        units = [[place[tuple(row.tolist())] for row in expert] for expert in gate_EID]
        assert sorted(sum(units, [])) == list(range(24)), "each unit is in one expert"
        importance = torch.stack([ffn.unit_importance[expert].sum() for expert in units])
        assert importance.max() - importance.min() <= ffn.unit_importance.max() - ffn.unit_importance.min()


def test_pruning_keeps_units_that_are_active_and_heard():
    ffn = SwiGLU(2, 4)
    ffn.unit_importance = torch.tensor([1.0, 2.0, 3.0, 0.1], dtype=torch.float64)
    ffn.down_proj.weight.data = torch.tensor([[3.0, 0.0, 0.1, 3.0], [4.0, 1.0, 0.0, 4.0]])
    # products 5, 2, 0.3, 0.5
    assert important_units(ffn, 2).tolist() == [0, 1] and important_units(ffn, 3).tolist() == [0, 1, 3]
