import copy
from typing import Any

import pytest
import torch
from transformers import AutoModel, LlamaConfig

from unimoe.errors import UserError
from unimoe.model.utils import count_parameters
from unimoe.moe import MoEConfig, install_moe, routing_context
from unimoe.moe.install import moe_layers
from unimoe.moe.parallel import divide_experts
from unimoe.moe.records import Context

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 4}
E = 4


def dense() -> Any:
    torch.manual_seed(0)
    return AutoModel.from_config(LlamaConfig(vocab_size=32, initializer_range=0.3, **SIZES))


def models(candidates: int = E, **router: Any) -> tuple[Any, Any]:
    """A plain mixture, and the same with pooled experts: layers 0 and 1 share, and 2 and 3."""
    settings = {"kind": "top_k", "k": 2, "init_std": 1.0, **router}
    plain, pooled = dense(), dense()
    install_moe(plain, MoEConfig(router=settings, experts={"copies": E, "noise": 0.5}, placement="all"))
    install_moe(
        pooled,
        MoEConfig(
            router={**settings, "candidates": candidates},
            experts={"kind": "pool", "copies": E, "group": 2},
            placement="all",
        ),
    )
    state = plain.state_dict()
    for name in [name for name in state if ".router." in name]:
        fresh = pooled.state_dict()[name].clone()
        fresh[:E] = state[name]
        state[name] = fresh
    pooled.load_state_dict(state)  # all other names are the same: nothing is stored twice
    return plain, pooled


def gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    with routing_context(Context()):
        y = model(input_ids=torch.arange(20).reshape(2, 10)).last_hidden_state
    y.square().sum().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_exact_a_closed_pool_is_the_plain_mixture_bit_for_bit():
    plain, pooled = models()
    (y, of), (pooled_y, pooled_of) = gradients(plain), gradients(pooled)
    assert torch.equal(y, pooled_y) and of.keys() == pooled_of.keys()
    for name, gradient in of.items():
        assert torch.equal(pooled_of[name][: len(gradient)], gradient), name
        assert not pooled_of[name][len(gradient) :].any(), name


def test_exact_number_of_new_parameters():
    plain, pooled = models()
    grown = sum(p.numel() for p in pooled.parameters()) - sum(p.numel() for p in plain.parameters())
    assert grown == (2 - 1) * E * SIZES["hidden_size"] * SIZES["num_hidden_layers"]
    assert count_parameters(pooled)[1] - count_parameters(plain)[1] == grown


def test_exact_an_open_pool_runs_the_neighbours_experts():
    """Against every expert of both layers on every token, in float64."""
    _, pooled = models(candidates=0)
    layers = moe_layers(pooled.double())
    x = torch.randn(9, SIZES["hidden_size"], dtype=torch.float64)
    for index, order in ((0, [0, 1]), (1, [1, 0]), (2, [2, 3])):
        weight_TE = layers[index].router(x, Context()).dense().double()
        assert weight_TE.shape[1] == E * len(order)
        expected = torch.zeros_like(x)
        for place, owner in enumerate(order):
            own: Any = layers[owner].experts
            for expert in range(E):
                gate, up = (x @ own.gate_up_proj[expert].T).chunk(2, dim=1)
                y = (torch.nn.functional.silu(gate) * up) @ own.down_proj[expert].T
                expected += weight_TE[:, place * E + expert, None] * y
        torch.testing.assert_close(layers[index](x), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("candidates", [5, 8])
def test_an_opening_pool_chooses_among_its_candidates(candidates):
    _, pooled = models(candidates)
    layer: Any = moe_layers(pooled)[0]
    routing = layer.router(torch.randn(200, SIZES["hidden_size"]), Context())
    assert sorted(routing.expert_N.unique().tolist()) == list(range(candidates))
    assert routing.num_experts == routing.probs_TE.shape[1] == candidates
    layer(torch.randn(200, SIZES["hidden_size"])).sum().backward()
    assert moe_layers(pooled)[1].experts.down_proj.grad.any(), "the neighbour's experts train"


def test_weights_belong_to_one_layer_and_a_copy_has_neighbours_of_its_own():
    _, pooled = models(candidates=0)
    names = [name for name, _ in pooled.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names)) == len(pooled.state_dict())
    copied = copy.deepcopy(pooled)
    layers: Any = moe_layers(copied)
    assert layers[0].experts.neighbours == (layers[1],) and layers[3].experts.neighbours == (layers[2],)


def test_gradients_with_checkpointing_are_the_same():
    _, pooled = models(candidates=0)
    _, plain = gradients(pooled.train())
    plain = {name: gradient.clone() for name, gradient in plain.items()}
    pooled.zero_grad()
    pooled.gradient_checkpointing_enable()
    for name, gradient in gradients(pooled)[1].items():
        assert torch.equal(gradient, plain[name]), name


def test_a_bias_follows_the_load_of_the_candidates():
    _, pooled = models(5, bias="scores", bias_rate=0.1)
    router: Any = moe_layers(pooled)[0].router
    router.after_step(torch.tensor([9.0, 0.0, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(router.bias, torch.tensor([-0.1, 0.1, 0.1, 0.1, 0.1, 0.0, 0.0, 0.0]))
    assert router(torch.randn(3, SIZES["hidden_size"]), Context()).num_experts == 5


def test_the_nearest_neighbours_come_first():
    model = dense()
    settings = {"kind": "pool", "copies": 2, "group": 4}
    install_moe(model, MoEConfig(router={"kind": "top_k", "k": 1}, experts=settings, placement="all"))
    layers: Any = moe_layers(model)
    assert [one.layer_index for one in layers[2].experts.neighbours] == [1, 3, 0]
    assert layers[2].router.num_experts == 8


def test_mistakes_name_what_was_found():
    _, pooled = models()
    with pytest.raises(UserError, match="PooledExperts run the experts of other layers"):
        divide_experts(moe_layers(pooled)[0], None, "all_reduce")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="candidates is 1, expected at least k = 2"):
        models(1)
    with pytest.raises(UserError, match=r"candidates is \[4, 8\], expected one number for all layers"):
        models([4, 4, 8, 8])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="moe.experts.group is 0, expected at least 1"):
        MoEConfig(experts={"kind": "pool", "group": 0})
    with pytest.raises(UserError, match="moe.experts.group is 3, expected a divisor of 4"):
        install_moe(dense(), MoEConfig(experts={"kind": "pool", "group": 3}, placement="all"))
