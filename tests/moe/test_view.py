import pytest
import torch
from torch import nn

from unimoe.detection import DynamicDinoConfig
from unimoe.detection.model.decoder import feed_forward
from unimoe.errors import UserError
from unimoe.moe import MoELayer, SwiGLUExperts
from unimoe.moe.routers.top_k import TopK
from unimoe.moe.routers.top_p import TopP
from unimoe.moe.view import view
from unimoe.testing import IMAGE, tiny_model
from unimoe.testing_stock import STOCK

OWN = {"experts": {"copies": 4}, "router": {"k": 2}, "placement": "all"}


@pytest.mark.parametrize("name", [*STOCK, "unimoe"])
def test_finds_every_layer(name, tmp_path):
    model = STOCK[name]() if name in STOCK else tiny_model(tmp_path, OWN, image=IMAGE)[0]
    layers = view(model)
    assert [layer.index for layer in layers] == list(range(len(layers)))
    assert {layer.layer for layer in layers} == ({1} if "deepseek" in name else {0, 1})
    assert all(layer.groups == (2 if name == "deepseek_v3" else 1) for layer in layers)
    shared = name in ("qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe")
    for layer in layers:
        assert (layer.shared is not None) == shared
        assert layer.router_rows().shape == (layer.num_experts, 32)
        one = layer.expert(layer.num_experts - 1)
        assert one["gate"].shape == one["up"].shape == one["down"].T.shape
        assert one["gate"].untyped_storage().data_ptr() in {
            stack.untyped_storage().data_ptr() for stack in layer.stacks().values()
        }


def test_the_detector_is_a_mixture_like_others():
    moe = {"experts": {"copies": 3, "slices": 2}, "router": {"k": 2}, "placement": "all"}
    config = DynamicDinoConfig(d_model=32, ffn_dim=24, num_heads=4, decoder_layers=2, moe=moe)
    decoder = nn.ModuleDict(
        {str(layer): nn.ModuleDict({"ffn": feed_forward(config, layer)}) for layer in (0, 1)}
    )
    layers = view(decoder)
    assert [(layer.name, layer.layer, layer.num_experts) for layer in layers] == [
        ("0.ffn", 0, 6),
        ("1.ffn", 1, 6),
    ]
    assert {name: one.shape for name, one in layers[0].expert(5).items()} == {
        "up": (12, 32),
        "down": (32, 12),
    }


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_visits_are_what_the_router_describes(device):
    with torch.device(device):
        for router, visits in (
            (TopK(8, 4, 2, null_experts=2), 2),
            (TopP(8, 4, p=0.6), 3),  # three of four equally probable experts
        ):
            layer = MoELayer(router, SwiGLUExperts(4, 8, 16))
            assert [one.top_k for one in view(nn.ModuleList([layer]))] == [visits]


def test_models_without_mixtures_are_refused():
    with pytest.raises(UserError, match="Linear has no MoE layers"):
        view(nn.Linear(2, 2))
