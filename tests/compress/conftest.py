"""Tiny random mixtures of every family, built once."""

import copy
from functools import cache
from typing import Any

import pytest
import torch

from unimoe.moe.view import view
from unimoe.testing import IMAGE, tiny_model
from unimoe.testing_stock import STOCK

OWN = {"experts": {"copies": 4}, "router": {"k": 2}, "placement": "all"}
FAMILIES = [*STOCK, "unimoe"]


@pytest.fixture(scope="session")
def families(tmp_path_factory) -> Any:
    """``families(name)``: a fresh copy of the model."""
    folder = tmp_path_factory.mktemp("unimoe")

    @cache
    def build(name: str) -> Any:
        torch.manual_seed(0)
        if name == "unimoe":
            model = tiny_model(folder, OWN, image=IMAGE)[0]
            for layer in model.model.language_model.layers:  # copies of one FFN: told apart
                for weight in layer.mlp.parameters():
                    torch.nn.init.normal_(weight, std=0.2)
            return model
        return STOCK[name]().eval()

    return lambda name: copy.deepcopy(build(name))


@pytest.fixture
def ids() -> torch.Tensor:
    """[2, 9] ids that are in every vocabulary and are no placeholder."""
    return torch.randint(1, 59, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(model, ids):
    return model(input_ids=ids).logits


def unequal(model):
    """Another number of experts in each layer; as many in each group."""
    layers = view(model)
    if layers[0].groups > 1:
        return [[0, 2, 3, 4, 5, 7]]
    return [[1, *range(2, layer.num_experts - layer.index)] for layer in layers]
