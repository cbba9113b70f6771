import torch
from torch import nn

from unimoe.compress.plan import Plan
from unimoe.compress.store import compress
from unimoe.model.utils import count_parameters, on_meta, to_device
from unimoe.moe.install import moe_layers
from unimoe.testing import tiny_model
from unimoe.testing_stock import STOCK


def test_experts_that_are_not_chosen_are_not_active(tmp_path):
    dense, _ = tiny_model(tmp_path)
    sparse, _ = tiny_model(tmp_path, {"num_experts": 4, "top_k": 2})
    total, active = count_parameters(dense)
    assert total == active == sum(parameter.numel() for parameter in dense.parameters())
    ffn = sum(parameter.numel() for parameter in dense.model.language_model.layers[0].mlp.parameters())
    total, active = count_parameters(sparse)
    assert total - active == len(moe_layers(sparse)) * 2 * ffn > 0


def test_packed_weights_count_as_what_they_stand_for():
    model = STOCK["mixtral"]()
    expected = count_parameters(model)
    compress(model, Plan(bits=8, linears=8, group=16))
    assert count_parameters(model) == expected and expected[1] < expected[0]


def test_tensors_move_inside_of_containers():
    meta = torch.device("meta")
    moved = to_device({"a": torch.zeros(2), "b": (torch.zeros(1), None), "c": "text"}, meta)
    assert moved["a"].is_meta and moved["b"][0].is_meta and moved["b"][1] is None and moved["c"] == "text"


def test_on_meta_modules_are_as_elsewhere_and_nothing_is_drawn():
    def shapes(module):
        return [
            (name, t.shape, t.dtype, t.requires_grad) for name, t in module.state_dict(keep_vars=True).items()
        ]

    parts = (nn.Linear(3, 2), nn.Conv2d(3, 4, 2), nn.Embedding(5, 3), nn.BatchNorm1d(3))
    state = torch.get_rng_state()
    with on_meta():
        found = (nn.Linear(3, 2), nn.Conv2d(3, 4, 2), nn.Embedding(5, 3), nn.BatchNorm1d(3))
        real = torch.zeros(2, device="cpu").fill_(3.0)
        drawn = nn.init.normal_(tensor=torch.empty(2))
    assert (
        all(weight.is_meta for module in found for weight in module.state_dict().values()) and drawn.is_meta
    )
    assert list(map(shapes, found)) == list(map(shapes, parts))
    assert real.tolist() == [3.0, 3.0] and torch.equal(torch.get_rng_state(), state)
