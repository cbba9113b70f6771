import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from unimoe.applications.restoration.restorer import MoFME, Restorer, RestorerConfig
from unimoe.errors import UserError
from unimoe.moe import record
from unimoe.moe.install import moe_layers

SMALL = {"channels": 4, "width": 16, "depth": 2, "heads": 2}
DESIGNS = ["mofme", "mofme_top_k", "ffn_moe", "dense"]


def make(design: str = "mofme", **settings) -> Restorer:
    torch.manual_seed(0)
    return Restorer(RestorerConfig(**{**SMALL, "design": design, **settings}))  # type: ignore[arg-type]


@pytest.mark.parametrize("design", DESIGNS)
def test_exact_a_fresh_model_returns_its_input(design):
    x = torch.rand(2, 3, 16, 16)
    assert make(design)(x).equal(x)


def test_exact_mofme_starts_as_the_ffn_of_its_trunk():
    mofme = MoFME(RestorerConfig(**SMALL), 0).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    trunk = F.gelu(x @ mofme.gate.weight.T + mofme.gate.bias) * (x @ mofme.value.weight.T + mofme.value.bias)
    assert mofme.layer.finish is not None
    assert_close(mofme(x), mofme.layer.finish.ffn(trunk), rtol=0, atol=1e-9)  # type: ignore[attr-defined]


@pytest.mark.parametrize("design", DESIGNS[:3])
@pytest.mark.parametrize(("experts", "k", "ffn"), [(4, 2, 4), (8, 1, 6)])
def test_active_parameters_are_those_of_the_dense_model(design, experts, k, ffn):
    """Of the experts that a token visits, routers and biases apart."""
    sizes = {"width": 64, "ffn": ffn, "experts": experts, "k": k}
    dense = sum(p.numel() for p in make("dense", **sizes).parameters())
    model = make(design, **sizes)
    idle = 0
    for layer in moe_layers(model).values():
        total = sum(p.numel() for p in layer.experts.parameters())
        idle += total - layer.experts.active_parameters(layer.experts_per_token)
        idle += sum(p.numel() for p in layer.router.parameters())
    assert sum(p.numel() for p in model.parameters()) - idle == pytest.approx(dense, rel=0.01)


def test_an_image_does_not_depend_on_the_others_nor_on_a_size():
    model = make().eval()
    nn.init.normal_(model.head.weight)
    x = torch.rand(3, 3, 16, 24)
    assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-5, atol=1e-6)
    with record() as records:
        model(x)
    assert [one.layer for one in records] == [0, 1]
    assert records[0].ctx.sample_T is not None and records[0].ctx.sample_T.bincount().tolist() == [24] * 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"heads": 3}, "width is 16, expected a multiple of model.restorer.heads, 3"),
        ({"depth": 0}, "depth is 0, expected at least 1"),
        ({"k": 5}, "k is 5, expected 1 to 4"),
        ({"ffn": 3}, "ffn is 3, expected at least 4: the trunk, 2 experts and the shared FFN"),
    ],
)
def test_mistakes_are_errors(wrong, message):
    with pytest.raises(UserError, match=message):
        make(**wrong)
