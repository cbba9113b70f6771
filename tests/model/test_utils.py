import torch

from unimoe.compress.plan import Plan
from unimoe.compress.store import compress
from unimoe.model.utils import count_parameters, to_device
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
