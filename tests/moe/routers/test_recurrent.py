from typing import Any

import pytest
import torch
from transformers import AutoModel, LlamaConfig

from unimoe.errors import UserError
from unimoe.moe import (
    Context,
    MoEConfig,
    RecurrentRouter,
    RouterDescription,
    install_moe,
    remember_context,
    routing_context,
)
from unimoe.moe.install import moe_layers

CELLS = ["decay", "gru"]


def two(cell: str, **settings: Any) -> list[Any]:
    return [RecurrentRouter(8, 4, 2, cell, 6, init_std=1.0, position=i, **settings) for i in range(2)]  # type: ignore[arg-type]


def route(routers: list[Any], x: torch.Tensor, detach: bool = False) -> list[Any]:
    """The routings of both layers, of the same tokens."""
    with routing_context(Context()) as ctx:
        first = routers[0](x, ctx)
        assert ctx.carry
        if detach:
            ctx.carry.update({name: state.detach() for name, state in ctx.carry.items()})
        return [first, routers[1](x, ctx)]


@pytest.mark.parametrize("cell", CELLS)
def test_the_second_layer_trains_the_projection_of_the_first(cell):
    routers, x = two(cell), torch.randn(10, 8)
    weight = routers[0].proj.weight
    through, cut = (route(routers, x, detach)[1].logits_TE.square().sum() for detach in (False, True))
    assert torch.autograd.grad(through, weight)[0].any()
    assert torch.autograd.grad(cut, weight, allow_unused=True)[0] is None


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_passes_between_tokens_or_forward_passes(cell):
    routers, x, order = two(cell), torch.randn(10, 8), torch.randperm(10)
    plain, permuted = route(routers, x)[1].logits_TE, route(routers, x[order])[1].logits_TE
    torch.testing.assert_close(permuted, plain[order])
    assert torch.equal(route(routers, x)[1].logits_TE, plain)
    alone = routers[1](x, Context())
    assert not torch.allclose(alone.logits_TE, plain)


def test_exact_a_decay_of_zero_is_no_memory():
    routers, x = two("decay"), torch.randn(10, 8)
    torch.nn.init.zeros_(routers[1].decay)
    assert torch.equal(route(routers, x)[1].logits_TE, routers[1](x, Context()).logits_TE)


def test_exact_the_gru_is_that_of_the_paper():
    """Eq. 4-6 of RMoE with the gates written out, in float64."""
    routers, x = [one.double() for one in two("gru")], torch.randn(10, 8, dtype=torch.float64)
    routers[1].gru.bias_hh.data.zero_()
    found = route(routers, x)[1].logits_TE
    gru, (r, z, n) = routers[1].gru, routers[1].gru.weight_ih.chunk(3)
    ur, uz, un = gru.weight_hh.chunk(3)
    br, bz, bn = gru.bias_ih.chunk(3)
    with routing_context(Context()) as ctx:
        routers[0](x, ctx)
        assert ctx.carry
        before = ctx.carry["router_state_TP"]
    new = x @ routers[1].proj.weight.T
    reset = (new @ r.T + before @ ur.T + br).sigmoid()
    update = (new @ z.T + before @ uz.T + bz).sigmoid()
    proposal = (new @ n.T + bn + reset * (before @ un.T)).tanh()
    state = (1 - update) * proposal + update * before
    expected = state @ routers[1].head.weight.T
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_exact_a_shared_gru_is_equal_grus_and_gets_their_gradients():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3}
    models: list[Any] = []
    for share in (True, False):
        torch.manual_seed(0)
        model = AutoModel.from_config(LlamaConfig(vocab_size=32, **sizes))
        router = {"kind": "recurrent", "cell": "gru", "size": 6, "k": 2, "init_std": 1.0, "share": share}
        install_moe(model, MoEConfig(router=router, experts={"copies": 4}, placement="all"))
        models.append(model.double())
    shared, own = models
    grus = [layer.router.gru for layer in moe_layers(own).values()]
    own.load_state_dict(shared.state_dict(), strict=False)
    for gru in grus[1:]:
        gru.load_state_dict(grus[0].state_dict())
    gradients = []
    for model in (shared, own):
        with routing_context(Context()):
            y = model(input_ids=torch.arange(12).reshape(2, 6)).last_hidden_state
        y.square().sum().backward()
        gradients.append(y.detach())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-9)
    (one,) = [layer.router.gru for layer in moe_layers(shared).values() if layer.router.gru is not None]
    for name, parameter in one.named_parameters():
        total = sum(gru.get_parameter(name).grad for gru in grus)
        torch.testing.assert_close(parameter.grad, total, rtol=0, atol=1e-9)
    names = [name for name, _ in shared.named_parameters(remove_duplicate=False) if "gru" in name]
    assert len(names) == 4, "stored once"
    assert [layer.router.linked for layer in moe_layers(shared).values()] == [False, True, True]


@pytest.mark.parametrize("cell", CELLS)
def test_gradient_checkpointing_gives_the_same_gradients(cell):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3}
    router = {"kind": "recurrent", "cell": cell, "size": 6, "k": 2, "init_std": 1.0, "bias": True}
    model: Any = AutoModel.from_config(LlamaConfig(vocab_size=32, **sizes))
    install_moe(model, MoEConfig(router=router, experts={"copies": 4}, placement="all"))
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
            remember_context(model)
        with routing_context(Context()):
            y = model.train()(input_ids=torch.arange(12).reshape(2, 6)).last_hidden_state
        y.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert gradients[0]["layers.0.mlp.router.proj.weight"].any()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name
    assert len(moe_layers(model)) == 3


def test_null_experts_start_disfavoured_and_the_bias_follows_the_load():
    router: Any = RecurrentRouter(8, 4, null_experts=1, bias=True, null_bias=-1.0, bias_rate=0.5)
    assert router.bias.tolist() == [0, 0, 0, 0, -1]
    router.after_step(torch.tensor([5.0, 0.0, 0.0, 0.0, 0.0]))
    assert router.bias.tolist() == [-0.5, 0.5, 0.5, 0.5, -0.5]
    assert not RecurrentRouter(8, 4).acts_on_load


def test_weights_are_probabilities_times_the_scale():
    router, x = two("decay", scale=3.0)[0], torch.randn(10, 8)
    routing = router(x, Context())
    torch.testing.assert_close(routing.dense(), 3 * routing.probs_TE * routing.chosen())
    routing = two("gru", renormalize=True)[0](x, Context())
    torch.testing.assert_close(routing.dense().sum(1), torch.ones(10))


def test_half_precision_models_route_in_float32():
    for cell in CELLS:
        router = two(cell)[0].bfloat16()
        assert router(torch.randn(3, 8, dtype=torch.bfloat16), Context()).logits_TE.dtype == torch.float32


def test_mistakes_name_what_was_found():
    with pytest.raises(UserError, match="cell is 'lstm', expected decay or gru"):
        RecurrentRouter(8, 4, cell="lstm")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="k is 5, expected 1..4"):
        RecurrentRouter(8, 4, k=5)


def test_it_describes_itself():
    assert RecurrentRouter(8, 4, 2).describe() == RouterDescription(4, 2, fixed=True)
