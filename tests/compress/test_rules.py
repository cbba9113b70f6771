import pytest
import torch

from unimoe.compress.rules import Rules, block_score, outlier_score
from unimoe.errors import UserError

EXPERT = "model.layers.{}.mlp.experts.{}.{}"


def test_later_kinds_override_earlier_ones_whatever_their_order():
    rules = Rules("keyword__gate_proj__8.layer_16_3.exp_l1e3_4.exp_l16e0_8.attn_4.shared_8.main_2")
    assert rules.bits("model.layers.0.self_attn.q_proj") == 4
    assert rules.bits(EXPERT.format(0, 3, "up_proj")) == 2
    assert rules.bits(EXPERT.format(1, 3, "up_proj")) == 4
    assert rules.bits(EXPERT.format(1, 30, "up_proj")) == 2
    assert rules.bits(EXPERT.format(11, 3, "up_proj")) == 2
    assert rules.bits(EXPERT.format(16, 0, "up_proj")) == 3, "layer is applied after exp, as in the code"
    assert rules.bits(EXPERT.format(16, 0, "gate_proj")) == 8
    assert rules.bits("model.layers.16.self_attn.q_proj") == 4, "layer_ is about experts"
    assert rules.bits("model.layers.2.mlp.shared_experts.up_proj") == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("main_2.attention_4", "cannot read 'attention_4'"),
        ("attn_4", "no main_B"),
        ("main_5", "asks for 5 bits"),
    ],
)
def test_rules_that_cannot_be_read_are_one_line(text, message):
    with pytest.raises(UserError, match=message):
        Rules(text)


@pytest.mark.parametrize(("layers", "expected"), [(4, 2.30), (8, 2.54)])
def test_average_bits_of_the_released_configurations(layers, expected):
    """Mixtral-8x7B with attention and the first blocks at 4 bits, the rest at 2 (comments of the released
    code)."""
    rules = Rules("main_2.attn_4" + "".join(f".layer_{layer}_4" for layer in range(layers)))
    hidden, inner = 4096, 14336
    sizes = [
        (rules.bits(f"model.layers.{layer}.self_attn.{name}_proj"), hidden * width)
        for layer in range(32)
        for name, width in {"q": hidden, "k": 1024, "v": 1024, "o": hidden}.items()
    ] + [
        (rules.bits(EXPERT.format(layer, expert, "w1")), 3 * hidden * inner)
        for layer in range(32)
        for expert in range(8)
    ]
    total = sum(bits * size for bits, size in sizes)
    assert total / sum(size for _, size in sizes) == pytest.approx(expected, abs=0.011)


def test_the_outlier_score_finds_a_planted_column_and_knows_no_scale():
    plain, planted = torch.randn(64, 32), torch.randn(64, 32)
    planted[3, 5] = 40
    assert outlier_score(planted) > 3 * outlier_score(plain)
    assert outlier_score(1000 * planted) == pytest.approx(outlier_score(planted), rel=1e-5)


def test_the_block_score_is_the_mean_cosine():
    x = torch.randn(10, 8)
    assert block_score(x, 3 * x) == pytest.approx(1)
    assert block_score(x, -x) == pytest.approx(-1)
