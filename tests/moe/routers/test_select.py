import pytest
import torch

from unimoe.errors import UserError
from unimoe.moe import TopK
from unimoe.moe.routers.select import keep_groups, one_of_each_slice


def test_the_best_groups_are_those_of_the_two_best_experts():
    choice = torch.tensor([[0.9, 0.0, 0.5, 0.5, 0.1, 0.2]])
    kept = keep_groups(choice, groups=3, top_groups=1)
    assert kept.tolist()[0][2:4] == [0.5, 0.5] and kept.isinf().sum() == 4  # 1.0 against 0.9 and 0.3
    assert torch.equal(keep_groups(choice, 6, 6), choice)


def test_every_slice_position_is_visited_equally_often():
    choice = torch.randn(50, 12)  # 4 copies of 3 slices
    index = one_of_each_slice(choice, 3, 6)
    assert all(sorted(row) == [0, 0, 1, 1, 2, 2] for row in (index % 3).tolist())
    first = one_of_each_slice(choice, 3, 3)
    for position in range(3):
        assert torch.equal(first[:, position], choice[:, position::3].argmax(1) * 3 + position)


def test_exact_one_slice_is_plain_top_k():
    choice = torch.randn(50, 8)
    assert torch.equal(one_of_each_slice(choice, 1, 3), choice.topk(3).indices)


def test_the_bias_moves_towards_the_mean_load_by_its_rate():
    router = TopK(8, 4, 2, bias="scores", bias_rate=0.5)
    router.after_step(torch.tensor([4.0, 0.0, 2.0, 2.0]))
    assert router.bias is not None and router.bias.tolist() == [-0.5, 0.5, 0.0, 0.0]
    assert router.acts_on_load and not TopK(8, 4, 2).acts_on_load
    TopK(8, 4, 2).after_step(torch.ones(4))


def test_the_bias_is_saved_and_does_not_train():
    router = TopK(8, 4, 2, bias="scores")
    assert list(router.state_dict()) == ["weight", "bias"]
    assert [name for name, _ in router.named_parameters()] == ["weight"]


def test_the_bias_takes_small_steps_in_half_precision():
    router = TopK(8, 4, 2, bias="scores", bias_rate=1e-3).bfloat16()
    for _ in range(1000):
        router.after_step(torch.tensor([9.0, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(router.bias, torch.tensor([-1.0, 1.0, 1.0, 1.0]))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"groups": 3}, "groups is 3, expected slices or a divisor of 4"),
        ({"groups": "nodes"}, "groups is 'nodes', expected slices or a divisor"),
        ({"groups": 2, "top_groups": 3}, "top_groups is 3, expected 1..2"),
        ({"groups": 4, "top_groups": 1}, "top_groups is 1, expected 2..4 for k = 2"),
        ({"groups": "slices", "slices": 4}, "k is 2, expected a multiple of 4"),
        (
            {"groups": "slices", "slices": 2, "null_experts": 2},
            "null_experts: expected 0 with groups: slices",
        ),
        ({"score": "tanh"}, "score is 'tanh', expected one of softmax, sigmoid, sqrt_softplus"),
        ({"bias": True}, "bias is True, expected scores, logits or nothing"),
    ],
)
def test_mistakes_name_what_was_found(settings, message):
    with pytest.raises(UserError, match=message):
        TopK(8, 4, **settings)
    with pytest.raises(UserError, match="k is 3, expected a multiple of 2"):
        one_of_each_slice(torch.zeros(1, 4), 2, 3)
