from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from unimoe.errors import UserError
from unimoe.moe import Context, HashRouter, MoELayer, RouterDescription, slice_experts
from unimoe.moe.routers.base import Router


def test_a_token_id_decides_and_the_weights_are_learned():
    router: Any = HashRouter(8, 4, 20, k=2, init_std=1.0)
    token, x = torch.randint(20, (30,)), torch.randn(30, 8)
    routing = router(x, Context(token_T=token))
    assert torch.equal(routing.chosen(), torch.zeros(30, 4).scatter(1, router.table[token], 1).bool())
    sums = torch.zeros(30).index_add(0, routing.token_N, routing.weight_N)
    torch.testing.assert_close(sums, torch.ones(30))
    (routing.weight_N * torch.randn(60)).sum().backward()
    assert router.weight.grad.any()


def test_the_table_is_spread_and_differs_between_layers_but_not_between_runs():
    tables = [HashRouter(8, 4, 4000, k=2, position=position).table for position in (0, 0, 1)]
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])
    assert (tables[0][:, 0] != tables[0][:, 1]).all()
    share = tables[0].flatten().bincount() / tables[0].numel()
    assert (share - 0.25).abs().max() < 0.02
    assert "table" in HashRouter(8, 4, 10).state_dict()


def test_exact_slices_of_whole_copies_are_the_dense_ffn():
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2)
    dense, x = LlamaMLP(config).double(), torch.randn(30, 16, dtype=torch.float64)
    router: Any = HashRouter(16, 8, 20, k=2, slices=2)
    assert torch.equal(router.table[:, 0] % 2, torch.zeros(20)) and (router.table.diff(dim=1) == 1).all()
    layer = MoELayer(Fed(router, torch.randint(20, (30,))), slice_experts(dense, 2, 4), "straight_through")
    torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-9)


class Fed(Router):
    """A router that is told the token ids."""

    def __init__(self, router, token_T):
        super().__init__()
        self.router, self.token_T, self.num_experts = router, token_T, router.num_experts

    def forward(self, x_TD, ctx):
        return self.router(x_TD, Context(token_T=self.token_T))


def test_it_can_be_built_without_memory():
    with torch.device("meta"):
        router = HashRouter(8, 4, 20, k=2)
    assert router.table.is_meta
    router.to_empty(device="cpu").reset_parameters()
    assert torch.equal(router.table, HashRouter(8, 4, 20, k=2).table)


def test_mistakes_name_what_was_found():
    with pytest.raises(UserError, match="hash chooses experts by token id, expected a model that reads them"):
        HashRouter(8, 4, 0)
    with pytest.raises(UserError, match="k is 3, expected a multiple of 2 in 1..4"):
        HashRouter(8, 4, 20, k=3, slices=2)
    with pytest.raises(UserError, match="the model got no input_ids"):
        HashRouter(8, 4, 20)(torch.randn(3, 8), Context())


def test_it_describes_itself():
    assert HashRouter(8, 4, 20, 2).describe() == RouterDescription(4, 2, fixed=True)
