import logging

import pytest
import torch
import torch.nn.functional as F

from unimoe.kernels import few_rows, native
from unimoe.kernels.swiglu import swiglu_experts_reference
from unimoe.moe.routing import sort_by_expert

pytestmark = pytest.mark.usefixtures("inference")
TOLERANCE = 1e-6
"""Of the largest value: float32 keeps 6e-8, and sums of up to 600 products are compared with float64."""


@pytest.fixture
def inference(operators):
    with torch.inference_mode():
        yield


def error(ours, expected):
    assert ours.dtype == torch.float32 and ours.shape == expected.shape
    return (ours - expected).abs().max() / expected.abs().max()


@pytest.mark.parametrize("rows", range(1, 17))
def test_linear_equals_float64(rows):
    # widths with and without a rest of 16 lanes, outputs with and without a rest of 6 and 12 rows
    for width, outputs in ((1, 1), (15, 7), (16, 12), (600, 131)):
        layer = few_rows.FewRowsLinear(width, outputs, bias=rows % 2 == 0)
        x = torch.randn(1, rows, width)
        bias = None if layer.bias is None else layer.bias.double()
        expected = F.linear(x.double(), layer.weight.double(), bias)
        assert few_rows.few(x, layer.weight)
        assert error(layer(x), expected) < TOLERANCE


def test_a_row_does_not_depend_on_the_others():
    layer, x = few_rows.FewRowsLinear(600, 131), torch.randn(16, 600)
    together = layer(x)
    for rows in (1, 2, 3, 5, 8):
        assert torch.equal(layer(x[-rows:]), together[-rows:])


def test_rows_that_are_not_contiguous():
    layer, x = few_rows.FewRowsLinear(33, 20, bias=False), torch.randn(33, 5)
    assert error(layer(x.t()), x.t().double() @ layer.weight.double().t()) < TOLERANCE
    # an odd offset: no vector is aligned
    flat = torch.randn(1 + 20 * 33)
    layer.weight.data = flat[1:].view(20, 33)
    assert error(layer(x.t()), x.t().double() @ layer.weight.double().t()) < TOLERANCE


def test_another_width_is_an_error_and_not_read():
    layer = torch.nn.Linear(32, 8)
    layer.__class__ = few_rows.FewRowsLinear
    with torch.no_grad(), pytest.raises(RuntimeError, match="cannot be multiplied"):
        layer(torch.ones(1, 64))


def test_everything_else_runs_in_torch(monkeypatch):
    layer = few_rows.FewRowsLinear(8, 4)
    monkeypatch.setattr(torch.ops.unimoe.few_rows_linear, "default", None)  # would raise
    assert torch.equal(layer(torch.ones(17, 8)), F.linear(torch.ones(17, 8), layer.weight, layer.bias))
    assert layer(torch.ones(0, 8)).shape == (0, 4)
    with torch.inference_mode(False), torch.enable_grad():
        trained = few_rows.FewRowsLinear(8, 4)
        trained(torch.ones(1, 8)).sum().backward()
        assert trained.weight.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(1, 8)).dtype == torch.bfloat16
    assert layer.double()(torch.ones(1, 8, dtype=torch.float64)).dtype == torch.float64
    transposed = few_rows.FewRowsLinear(8, 8)
    transposed.weight.data = transposed.weight.data.t()
    assert transposed(torch.ones(1, 8)).shape == (1, 8)


@pytest.mark.parametrize("width", [1, 16, 75, 600])
def test_rms_norm_equals_float64(width):
    x, weight = torch.randn(2, 3, width), torch.randn(width)
    expected = F.rms_norm(x.double(), (width,), weight.double(), 1e-5)
    assert error(few_rows.rms_norm(x, weight, 1e-5), expected) < TOLERANCE


def rotated(x, cos, sin):
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


@pytest.mark.parametrize("rows, shared", [(1, 1), (3, 2), (2, 4)])
@pytest.mark.parametrize("length, width", [(1, 6), (33, 16)])
def test_attention_of_one_token_equals_float64(rows, shared, length, width):
    heads = 2
    q, k, v = (torch.randn(rows, 1, count * width) for count in (heads * shared, heads, heads))
    angle = torch.randn(rows, 1, width)
    keys, values = torch.randn(2, rows, heads, length + 2, width)
    mask = torch.ones(rows, 1, 1, length + 1, dtype=torch.bool)
    for row in range(rows - 1):
        mask[row, ..., : (row + 1) * length // rows] = False
    behind = keys[:, :, -1].clone()
    given = (keys.clone(), values.clone())
    found = few_rows.attention(q, k, v, angle.cos(), angle.sin(), keys, values, length, mask, 0.3)

    turn = (angle.double().cos()[:, :, None], angle.double().sin()[:, :, None])
    q = rotated(q.double().view(rows, 1, -1, width), *turn).transpose(1, 2)
    new = (
        rotated(k.double().view(rows, 1, -1, width), *turn).transpose(1, 2),
        v.double().view(rows, 1, -1, width).transpose(1, 2),
    )
    together = [torch.cat([old[:, :, :length].double(), one], 2) for old, one in zip(given, new, strict=True)]
    expected = F.scaled_dot_product_attention(q, *together, attn_mask=mask, scale=0.3, enable_gqa=True)
    assert error(found, expected.transpose(1, 2).flatten(2)) < 5 * TOLERANCE
    assert error(keys[:, :, : length + 1], together[0]) < TOLERANCE
    assert error(values[:, :, : length + 1], together[1]) < TOLERANCE
    assert torch.equal(keys[:, :, -1], behind)


def test_attention_checks_what_it_reads():
    keys, x, angle = torch.zeros(1, 2, 4, 6), torch.zeros(1, 1, 12), torch.zeros(1, 1, 6)
    with pytest.raises(RuntimeError, match="do not fit the cache"):
        few_rows.attention(x, x, x, angle, angle, keys, keys.clone(), 4, None, 1.0)
    with pytest.raises(RuntimeError, match="float32"):
        few_rows.attention(x, x.double(), x, angle, angle, keys, keys.clone(), 3, None, 1.0)


def mixture(tokens, experts, inner=37, hidden=41):
    return (
        torch.randn(tokens, hidden),
        torch.randn(experts, 2 * inner, hidden) * 0.2,
        torch.randn(experts, hidden, inner) * 0.2,
    )


def experts_in_float64(x, gate_up, down, index_TK, weight_TK):
    """Sum over the pairs of each token; ids behind the experts add nothing."""
    slot_N, token_N, _, offsets_E1 = sort_by_expert(index_TK, gate_up.shape[0])
    weight_N = weight_TK.double().reshape(-1)[slot_N]
    y_ND = swiglu_experts_reference(
        x.double()[token_N], offsets_E1, gate_up.double(), down.double(), weight_N
    )
    return torch.zeros_like(x, dtype=torch.float64).index_add(0, token_N, y_ND)


@pytest.mark.parametrize("tokens", range(1, 17))
@pytest.mark.parametrize("experts, null, k", [(4, 0, 2), (1, 0, 1), (3, 2, 2), (8, 0, 8)])
@pytest.mark.parametrize("gating", ["topk_softmax", "softmax_topk", "renormalized"])
def test_a_whole_layer_equals_float64(tokens, experts, null, k, gating):
    x, gate_up, down = mixture(tokens, experts)
    router = torch.randn(experts + null, x.shape[1]) * 0.3
    late, renormalize = gating == "topk_softmax", gating == "renormalized"
    found = few_rows.moe(x, router, k, gate_up, down, late=late, renormalize=renormalize, scale=1.5)
    logits = x.double() @ router.double().t()
    best, index = logits.topk(k, dim=-1)
    weight = best.softmax(-1) if late else logits.softmax(-1).gather(1, index)
    weight = 1.5 * (weight / weight.sum(-1, keepdim=True) if renormalize else weight)
    assert error(found.logits_TE, logits) < TOLERANCE
    assert torch.equal(found.index_TK, index)
    assert error(found.weight_TK, weight) < 5 * TOLERANCE  # exp of a logit of size 5
    expected = experts_in_float64(x, gate_up, down, index, weight)
    assert (found.y_TH - expected).abs().max() < 5 * TOLERANCE * max(expected.abs().max(), 1)


@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_experts_of_any_routing_equal_float64(tokens):
    x, gate_up, down = mixture(tokens, 5)
    index_TK = torch.stack([torch.randperm(6)[:3] for _ in range(tokens)])  # id 5 is a null expert
    index_TK[0] = torch.tensor([0, 1, 5])
    weight_TK = torch.randn(tokens, 3)
    slot_N, token_N, _, offsets_E1 = sort_by_expert(index_TK, 5)
    found = few_rows.experts(x, token_N, offsets_E1, weight_TK.reshape(-1)[slot_N], gate_up, down)
    assert error(found, experts_in_float64(x, gate_up, down, index_TK, weight_TK)) < 5 * TOLERANCE


def test_more_pairs_of_an_expert_than_tokens():
    x, gate_up, down = mixture(3, 1)
    token_N, weight_N = torch.arange(40) % 3, torch.rand(40)
    found = few_rows.experts(x, token_N, torch.tensor([0, 40]), weight_N, gate_up, down)
    once = experts_in_float64(x, gate_up, down, torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1))
    summed = torch.zeros(3).index_add(0, token_N, weight_N)
    assert error(found, once * summed[:, None]) < 5 * TOLERANCE


def test_weights_that_are_not_visited_are_not_read():
    x, gate_up, down = mixture(2, 3)
    gate_up[1], down[1] = torch.nan, torch.nan
    token_N, offsets_E1 = torch.tensor([0, 1]), torch.tensor([0, 1, 1, 2])
    assert few_rows.experts(x, token_N, offsets_E1, torch.ones(2), gate_up, down).isfinite().all()


def test_one_log_line_says_what_runs(caplog, monkeypatch):
    few_rows._log.cache_clear()
    with caplog.at_level(logging.INFO, logger=few_rows.__name__):
        assert few_rows.available() and few_rows.available()
        monkeypatch.setattr(native, "ops", lambda: None)
        assert not few_rows.available()
    processor = torch.backends.cpu.get_cpu_capability()
    assert caplog.messages == [
        f"products of few rows run in C++ ({processor})",
        "products of few rows run in torch",
    ]
