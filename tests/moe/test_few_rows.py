import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from unimoe.kernels import few_rows as kernel
from unimoe.kernels import native
from unimoe.moe import FFNExperts, LoRAExperts, MoELayer, SwiGLUExperts, TopK, TopP, record
from unimoe.moe.few_rows import FewRowsExperts, FewRowsMoELayer, few_rows


@pytest.fixture(autouse=True)
def _operators(built):
    if native.ops() is None:
        pytest.skip("UNIMOE_NATIVE is 0, or the library does not load")


def layer(experts=4, router=None, **kw) -> Any:
    inner = SwiGLUExperts(experts, 24, 36, init_std=0.3)
    return MoELayer(router or TopK(24, experts, 2, init_std=0.5), inner, **kw).eval()


LAYERS = {
    "top_k": layer,
    "softmax_topk": lambda: layer(router=TopK(24, 4, 2, "softmax_topk", renormalize=False, init_std=0.5)),
    "null": lambda: layer(router=TopK(24, 4, 2, null_experts=3, init_std=0.5)),
    "null_identity": lambda: layer(
        router=TopK(24, 4, 2, null_experts=3, init_std=0.5), null_output="identity"
    ),
    "shared": lambda: layer(shared=SwiGLUExperts(2, 24, 20)),
    "shared_dense": lambda: layer(shared=nn.Linear(24, 24)),
    "slices": lambda: layer(
        router=TopK(24, 4, 2, groups="slices", slices=2, init_std=0.5), slices=2, combine="k_weight"
    ),
    "sigmoid": lambda: layer(router=TopK(24, 4, 2, score="sigmoid", bias="scores", scale=2.5, init_std=0.5)),
    "top_p": lambda: layer(router=TopP(24, 4, 0.7, init_std=0.5)),
    "candidates": lambda: layer(router=TopK(24, 4, 2, candidates=3, init_std=0.5)),
    "gelu": lambda: MoELayer(
        TopK(24, 4, 2, init_std=0.5), SwiGLUExperts(4, 24, 36, "gelu", init_std=0.3)
    ).eval(),
    "lora": lambda: MoELayer(
        TopK(24, 4, 2, init_std=0.5), LoRAExperts(SwiGLUExperts(4, 24, 36, init_std=0.3), 2, 4)
    ).eval(),
    "ffn": lambda: MoELayer(TopK(24, 4, 2, init_std=0.5), FFNExperts(4, 24, 36, init_std=0.3)).eval(),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("tokens", [1, 7, 16, 17])
def test_output_and_record_are_those_of_the_layer_in_float64(name, tokens):
    moe = LAYERS[name]()
    exact, x = copy.deepcopy(moe).double(), torch.randn(2, tokens, 24)[:1]
    with torch.no_grad():
        with few_rows(moe), record() as found:
            y = moe(x)
        with record() as expected:
            y_exact = exact(x.double())
    assert (y - y_exact).abs().max() < 5e-6 * max(y_exact.abs().max(), 1)
    (ours,), (theirs,) = found, expected
    assert ours.layer == theirs.layer and ours.routing.num_experts == theirs.routing.num_experts
    assert torch.equal(ours.routing.chosen(), theirs.routing.chosen())
    for name in ("token_N", "expert_N", "offsets_E1"):
        assert torch.equal(getattr(ours.routing, name), getattr(theirs.routing, name))
    for name in ("weight_N", "logits_TE", "probs_TE"):
        torch.testing.assert_close(
            getattr(ours.routing, name).double(), getattr(theirs.routing, name).double(), rtol=1e-5, atol=1e-5
        )


def test_which_layers_run_in_one_operator():
    whole = {name for name, build in LAYERS.items() if _inside(build()) is FewRowsMoELayer}
    assert whole == {"top_k", "softmax_topk", "null", "shared", "shared_dense"}


def _inside(module):
    with few_rows(module):
        return type(module)


def test_experts_of_other_routers_run_in_theirs(monkeypatch):
    calls = []
    monkeypatch.setattr(kernel, "experts", lambda x, *rest: calls.append(x) or torch.zeros_like(x))
    names = ("null_identity", "slices", "sigmoid", "top_p", "candidates")
    for name in names:
        moe = LAYERS[name]()
        with torch.no_grad(), few_rows(moe):
            moe(torch.randn(3, 24))
    assert len(calls) == len(names)


def test_afterwards_every_module_is_what_it_was():
    model = nn.Sequential(nn.Linear(24, 24), layer(shared=SwiGLUExperts(1, 24, 8)))
    kinds = [type(module) for module in model.modules()]
    names = list(model.state_dict())
    with pytest.raises(ValueError, match="inside"), few_rows(model):
        assert {type(module) for module in model.modules()} >= {kernel.FewRowsLinear, FewRowsExperts}
        assert list(model.state_dict()) == names
        with few_rows(model):
            pass
        assert type(model[0]) is kernel.FewRowsLinear
        raise ValueError("inside")
    assert [type(module) for module in model.modules()] == kinds


def test_training_inside_is_that_of_the_layer():
    model = nn.Sequential(nn.Linear(24, 24), layer())
    other, x = copy.deepcopy(model), torch.randn(3, 24)
    other(x).square().sum().backward()
    with few_rows(model):
        model(x).square().sum().backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


def test_a_module_can_be_copied_pickled_and_compiled_inside():
    model, x = nn.Sequential(nn.Linear(24, 24), layer()), torch.randn(3, 24)
    with torch.no_grad(), few_rows(model):
        y = model(x)
        assert torch.equal(copy.deepcopy(model)(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)
        compiled: Any = torch.compile(model[0], backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model[0](x))


def test_nothing_changes_where_the_operators_are_not_built(monkeypatch):
    monkeypatch.setattr(native, "ops", lambda: None)
    assert _inside(layer()) is MoELayer
